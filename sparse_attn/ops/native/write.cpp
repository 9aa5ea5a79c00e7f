// The C interface of writing: a KV head's keys, and its values, are an item each, since statistics are summed in order.
#include "write.h"

#include <atomic>

#include "runtime.h"

extern "C" {

int32_t foveate_write_size(void) { return int32_t(sizeof(foveate_write)); }

int32_t foveate_write_run(const foveate_write* call_pointer) {
    const foveate_write& call = *call_pointer;
    for (int64_t t = 0; t < call.num_tokens; ++t)
        if (call.slots[t] >= call.num_pages * call.page_size) return 1;
    struct Shared {
        const foveate_write& call;
        std::atomic<int> next{0};
    } shared{call};
    auto body = [](void* data) {
        Shared& shared = *static_cast<Shared*>(data);
        for (int i; (i = shared.next.fetch_add(1)) < 2 * shared.call.num_kv_heads;)
            kWriteRowsAvx2(shared.call, i / 2, i % 2);
    };
    // A thread that is woken for less than 64 KiB costs more than it saves.
    const int64_t bytes = call.num_tokens * call.num_kv_heads * call.head_dim * (call.dtype == FOVEATE_FLOAT32 ? 8 : 4);
    const int64_t useful = bytes / (64 * 1024) + 1, items = 2 * call.num_kv_heads;
    const int64_t most = useful < items ? useful : items;
    foveate_on_threads(body, &shared, call.num_threads < most ? call.num_threads : most);
    return 0;
}
}
