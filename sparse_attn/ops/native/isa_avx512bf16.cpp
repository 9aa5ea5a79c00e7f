// float32 calls take the AVX-512 table.
#include "decode.h"
#include "fma_engine.h"
#include "quantised.h"
#include "threshold.h"

namespace {
constexpr IsaKernels kTables[2] = {
    threshold_kernels_of<DotEngine, VectorProducts<DotRows>>(),
    threshold_kernels_of<Quantised<DotEngine>, VectorProducts<FloatRows<Vec16, bfloat16, int8_t>>>(),
};
}
extern const IsaKernels* const kAvx512Bf16Kernels = kTables;
