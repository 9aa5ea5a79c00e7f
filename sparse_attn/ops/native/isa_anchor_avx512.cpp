#include "anchor.h"
#include "fma_engine.h"

namespace {
constexpr AnchorKernels kTables[4] = {
    anchor_kernels_of<FmaEngine<Vec16, float>, VectorProducts<FloatRows<Vec16, float>>>(),
    anchor_kernels_of<FmaEngine<Vec16, bfloat16>, VectorProducts<FloatRows<Vec16, bfloat16>>>(),
    anchor_kernels_of<FmaEngine<Vec16, float, int8_t>, VectorProducts<FloatRows<Vec16, float, int8_t>>>(),
    anchor_kernels_of<FmaEngine<Vec16, bfloat16, int8_t>, VectorProducts<FloatRows<Vec16, bfloat16, int8_t>>>(),
};
}
extern const AnchorKernels* const kAnchorAvx512 = kTables;
