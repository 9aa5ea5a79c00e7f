// float32 calls take the AVX-512 table.
#include "decode.h"
#include "fma_engine.h"
#include "threshold.h"

namespace {
const IsaKernels kTable = threshold_kernels_of<DotEngine, VectorProducts<DotRows>>();
}
extern const IsaKernels* const kAvx512Bf16Kernels = &kTable;
