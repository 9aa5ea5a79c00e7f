#include "decode.h"
#include "fma_engine.h"
#include "threshold.h"

namespace {
const IsaKernels kTables[2] = {
    threshold_kernels_of<FmaEngine<Vec16, float>, VectorProducts<FloatRows<Vec16, float>>>(),
    threshold_kernels_of<FmaEngine<Vec16, bfloat16>, VectorProducts<FloatRows<Vec16, bfloat16>>>(),
};
}
extern const IsaKernels* const kAvx512Kernels = kTables;
