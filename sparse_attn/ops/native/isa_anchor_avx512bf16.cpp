// float32 calls take the AVX-512 table.
#include "anchor.h"
#include "fma_engine.h"

namespace {
const AnchorKernels kTable = anchor_kernels_of<DotEngine>(nothing, nothing);
}
extern const AnchorKernels* const kAnchorAvx512Bf16 = &kTable;
