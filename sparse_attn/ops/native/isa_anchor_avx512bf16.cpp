// float32 calls take the AVX-512 table.
#include "anchor.h"
#include "byte_engine.h"
#include "fma_engine.h"

namespace {
constexpr AnchorKernels kTables[2] = {
    anchor_kernels_of<DotEngine, VectorProducts<DotRows>>(),
    anchor_kernels_of<ByteEngine, VectorProducts<FloatRows<Vec16, bfloat16, int8_t>>>(),
};
}
extern const AnchorKernels* const kAnchorAvx512Bf16 = kTables;
