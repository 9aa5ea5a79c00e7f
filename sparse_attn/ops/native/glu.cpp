// Gated activations: cuts a call into runs of rows, and runs them on torch's threads.
#include "glu.h"

#include <atomic>

#include "runtime.h"

namespace {

constexpr int64_t kItem = 8192;  // elements of a run: about as much work as it costs to wake a thread

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

int32_t foveate_glu_run(const foveate_glu* call_pointer) {
    const foveate_glu& call = *call_pointer;
    struct Shared {
        const foveate_glu& call;
        GluRows rows;
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
