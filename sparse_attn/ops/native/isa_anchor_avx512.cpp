#include "anchor.h"
#include "fma_engine.h"

namespace {
const AnchorKernels kTables[2] = {
    anchor_kernels_of<FmaEngine<Vec16, float>>(nothing, nothing),
    anchor_kernels_of<FmaEngine<Vec16, bfloat16>>(nothing, nothing),
};
}
extern const AnchorKernels* const kAnchorAvx512 = kTables;
