#include "decode.h"
#include "fma_engine.h"
#include "threshold.h"
#include "word_engine.h"
#include "word_products.h"

namespace {
constexpr IsaKernels kTables[4] = {
    threshold_kernels_of<FmaEngine<Vec8, float>, VectorProducts<FloatRows<Vec8, float>>>(),
    threshold_kernels_of<FmaEngine<Vec8, bfloat16>, VectorProducts<FloatRows<Vec8, bfloat16>>>(),
    threshold_kernels_of<WordEngine<float>, WordProducts<float>, FmaEngine<Vec8, float, int8_t>>(),
    threshold_kernels_of<WordEngine<bfloat16>, WordProducts<bfloat16>, FmaEngine<Vec8, bfloat16, int8_t>>(),
};
}
extern const IsaKernels* const kAvx2Kernels = kTables;
