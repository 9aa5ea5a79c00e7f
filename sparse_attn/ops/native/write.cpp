// The C interface of writing: a KV head's keys, and its values, are an item each, since statistics are summed in order.
// So are the queries of a head, where they are rotated.
#include "write.h"

#include <atomic>

#include "runtime.h"

extern "C" {

int32_t foveate_write_size(void) { return int32_t(sizeof(foveate_write)); }

int32_t foveate_write_run(const foveate_write* call_pointer) {
    const foveate_write& call = *call_pointer;
    for (int64_t t = 0; t < call.num_tokens; ++t)
        if (call.slots[t] >= call.num_pages * call.page_size) return 1;
    const int heads = call.cos ? call.num_heads : 0;
    struct Shared {
        const foveate_write& call;
        const int items;
        std::atomic<int> next{0};
    } shared{call, 2 * call.num_kv_heads + heads};
    auto body = [](void* data) {
        Shared& shared = *static_cast<Shared*>(data);
        const int written = 2 * shared.call.num_kv_heads;
        for (int i; (i = shared.next.fetch_add(1)) < shared.items;) {
            if (i < written) kWriteAvx2.rows(shared.call, i / 2, i % 2);
            else kWriteAvx2.rotate(shared.call, i - written);
        }
    };
    // A thread that is woken for less than 64 KiB costs more than it saves.
    const int64_t element = call.dtype == FOVEATE_FLOAT32 ? 4 : 2;
    const int64_t bytes = call.num_tokens * shared.items * call.head_dim * element;
    const int64_t useful = bytes / (64 * 1024) + 1;
    const int64_t most = useful < shared.items ? useful : shared.items;
    foveate_on_threads(body, &shared, call.num_threads < most ? call.num_threads : most);
    return 0;
}
}
