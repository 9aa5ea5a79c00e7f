#include "anchor.h"
#include "fma_engine.h"

namespace {
const AnchorKernels kTables[2] = {
    anchor_kernels_of<FmaEngine<Vec8, float>>(nothing, nothing),
    anchor_kernels_of<FmaEngine<Vec8, bfloat16>>(nothing, nothing),
};
}
extern const AnchorKernels* const kAnchorAvx2 = kTables;
