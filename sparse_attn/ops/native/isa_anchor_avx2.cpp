#include "anchor.h"
#include "fma_engine.h"
#include "six_bit_engine.h"
#include "word_products.h"

namespace {
constexpr AnchorKernels kTables[4] = {
    anchor_kernels_of<FmaEngine<Vec8, float>, VectorProducts<FloatRows<Vec8, float>>>(),
    anchor_kernels_of<FmaEngine<Vec8, bfloat16>, VectorProducts<FloatRows<Vec8, bfloat16>>>(),
    anchor_kernels_of<SixBitEngine<float>, WordProducts<float>>(),
    anchor_kernels_of<SixBitEngine<bfloat16>, WordProducts<bfloat16>>(),
};
}
extern const AnchorKernels* const kAnchorAvx2 = kTables;
