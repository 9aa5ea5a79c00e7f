// RMS norms: cuts a call into runs of rows, and runs them on threads.
#include "norm.h"

#include "items.h"

namespace {

constexpr int64_t kElements = 16384;  // of a run: about as much work as it costs to wake a thread

NormRows rows_of(const foveate_norm& call) {
#if defined(FOVEATE_BUILT_NORM_AVX512)
    if (call.isa >= FOVEATE_AVX512) return kNormAvx512[call.dtype];
#endif
#if defined(FOVEATE_BUILT_NORM_AVX2)
    return kNormAvx2[call.dtype];
#endif
    return nullptr;
}

}  // namespace

extern "C" {

int32_t foveate_norm_size(void) { return int32_t(sizeof(foveate_norm)); }

int32_t foveate_norm_run(const foveate_norm* call) {
    run_rows(*call, rows_of(*call), kElements);
    return 0;
}
}
