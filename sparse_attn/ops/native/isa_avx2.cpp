#include "decode.h"
#include "fma_engine.h"
#include "threshold.h"

namespace {
const IsaKernels kTables[2] = {
    threshold_kernels_of<FmaEngine<Vec8, float>, VectorProducts<FloatRows<Vec8, float>>>(),
    threshold_kernels_of<FmaEngine<Vec8, bfloat16>, VectorProducts<FloatRows<Vec8, bfloat16>>>(),
};
}
extern const IsaKernels* const kAvx2Kernels = kTables;
