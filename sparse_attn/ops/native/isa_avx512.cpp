#include "decode.h"
#include "fma_engine.h"

namespace {
const IsaKernels kTables[2] = {
    kernels_of<FmaEngine<Vec16, float>, VectorProducts<FloatRows<Vec16, float>>>(),
    kernels_of<FmaEngine<Vec16, bfloat16>, VectorProducts<FloatRows<Vec16, bfloat16>>>(),
};
}
extern const IsaKernels* const kAvx512Kernels = kTables;
