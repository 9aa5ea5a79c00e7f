// RMS norms: cuts a call into runs of rows, and runs them on torch's threads.
#include "norm.h"

#include <atomic>

#include "runtime.h"

namespace {

constexpr int64_t kItem = 16384;  // elements of a run: about as much work as it costs to wake a thread

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

int32_t foveate_norm_run(const foveate_norm* call_pointer) {
    const foveate_norm& call = *call_pointer;
    struct Shared {
        const foveate_norm& call;
        NormRows rows;
        int64_t step, items;
        std::atomic<int64_t> next{0};
    } shared{call, rows_of(call), 1 + kItem / (call.width + 1), 0};
    shared.items = (call.rows + shared.step - 1) / shared.step;
    auto body = [](void* data) {
        Shared& shared = *static_cast<Shared*>(data);
        for (int64_t i; (i = shared.next.fetch_add(1)) < shared.items;) {
            const int64_t first = i * shared.step, last = first + shared.step;
            shared.rows(shared.call, first, last < shared.call.rows ? last : shared.call.rows);
        }
    };
    foveate_on_threads(body, &shared, call.num_threads < shared.items ? call.num_threads : shared.items);
    return 0;
}
}
