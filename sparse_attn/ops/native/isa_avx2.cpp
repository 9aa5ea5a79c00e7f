#include "decode.h"
#include "fma_engine.h"

namespace {
const IsaKernels kTables[2] = {
    kernels_of<FmaEngine<Vec8, float>, VectorProducts<FloatRows<Vec8, float>>>(),
    kernels_of<FmaEngine<Vec8, bfloat16>, VectorProducts<FloatRows<Vec8, bfloat16>>>(),
};
}
extern const IsaKernels* const kAvx2Kernels = kTables;
