// The C interface of writing: a KV head's keys, and its values, are an item each, since statistics are summed in order.
// So are the queries of a head, where they are rotated.
#include "write.h"

#include "items.h"

extern "C" {

int32_t foveate_write_size(void) { return int32_t(sizeof(foveate_write)); }

int32_t foveate_write_run(const foveate_write* call_pointer) {
    const foveate_write& call = *call_pointer;
    for (int64_t t = 0; t < call.num_tokens; ++t)
        if (call.slots[t] >= call.num_pages * call.page_size) return 1;
    const int heads = call.cos ? call.num_heads : 0;
    const int written = 2 * call.num_kv_heads, items = written + heads;
    const int64_t bytes = call.num_tokens * items * call.head_dim * (call.dtype == FOVEATE_FLOAT32 ? 4 : 2);
    run_items(items, threads_for(call.num_threads, bytes), [&](int64_t i) {
        if (i < written) kWriteAvx2.rows(call, int(i / 2), int(i % 2));
        else kWriteAvx2.rotate(call, int(i) - written);
    });
    return 0;
}
}
