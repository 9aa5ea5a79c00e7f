#include "decode.h"
#include "fma_engine.h"
#include "threshold.h"

namespace {
constexpr IsaKernels kTables[4] = {
    threshold_kernels_of<FmaEngine<Vec16, float>, VectorProducts<FloatRows<Vec16, float>>>(),
    threshold_kernels_of<FmaEngine<Vec16, bfloat16>, VectorProducts<FloatRows<Vec16, bfloat16>>>(),
    threshold_kernels_of<FmaEngine<Vec16, float, int8_t>, VectorProducts<FloatRows<Vec16, float, int8_t>>>(),
    threshold_kernels_of<FmaEngine<Vec16, bfloat16, int8_t>, VectorProducts<FloatRows<Vec16, bfloat16, int8_t>>>(),
};
}
extern const IsaKernels* const kAvx512Kernels = kTables;
