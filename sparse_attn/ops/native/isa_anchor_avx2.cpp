#include "anchor.h"
#include "fma_engine.h"

namespace {
constexpr AnchorKernels kTables[4] = {
    anchor_kernels_of<FmaEngine<Vec8, float>>(nothing, nothing),
    anchor_kernels_of<FmaEngine<Vec8, bfloat16>>(nothing, nothing),
    anchor_kernels_of<FmaEngine<Vec8, float, int8_t>>(nothing, nothing),
    anchor_kernels_of<FmaEngine<Vec8, bfloat16, int8_t>>(nothing, nothing),
};
}
extern const AnchorKernels* const kAnchorAvx2 = kTables;
