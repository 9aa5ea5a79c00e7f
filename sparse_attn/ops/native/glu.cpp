// Gated activations: cuts a call into runs of rows, and runs them on threads.
#include "glu.h"

#include "items.h"

namespace {

constexpr int64_t kElements = 8192;  // of a run: about as much work as it costs to wake a thread

GluRows rows_of(const foveate_glu& call) {
#if defined(FOVEATE_BUILT_GLU_AVX512)
    if (call.isa >= FOVEATE_AVX512) return kGluAvx512[call.dtype];
#endif
#if defined(FOVEATE_BUILT_GLU_AVX2)
    return kGluAvx2[call.dtype];
#endif
    return nullptr;
}

}  // namespace

extern "C" {

int32_t foveate_glu_size(void) { return int32_t(sizeof(foveate_glu)); }

int32_t foveate_glu_run(const foveate_glu* call) {
    run_rows(*call, rows_of(*call), kElements);
    return 0;
}
}
