// Work items, and the functions that each instruction set offers for them. Its tables are constexpr: one that had to be
// filled as the library is opened would be filled by that set's own instructions, on CPUs without them too.
#pragma once

#include "kernels.h"

// Some queries of one sequence (or of one selection tile) for one KV head, or one query head where a selection has
// a row for each.
struct PrefillItem {
    int32_t row;       // of the selection
    int32_t sequence;
    int32_t start;     // first query, in the packed row
    int32_t count;
    int32_t position;  // of the first query
    int32_t kind;      // KV head, or query head
    int32_t step = 1;  // from one query to the next, in rows and in positions; only anchors take other than 1
};

// Behind the position of its last query.
static inline int64_t end_of(const PrefillItem& item) {
    return item.position + int64_t(item.count - 1) * item.step + 1;
}

constexpr int kDecodeBlock = 128;  // keys; 16 KiB of K and as much of V at 64 channels of bfloat16

// A part of the keys of one query.
struct DecodeItem {
    int64_t whole;  // number of the query and kind that it is a part of
    int64_t part;
    int32_t row;  // of the selection
    int32_t sequence;
    int32_t query;  // in the packed row
    int32_t kind;
    int64_t position;
    int64_t first;  // positions, or units of the selection row
    int64_t last;
};

// What a decode item leaves for the merge: per head the reference of its exponents, the sum of its weights, and the
// weighted sum of its values. ``partial`` holds ``group * (head_dim + 2)`` floats.
struct IsaKernels {
    // Most query rows (queries x heads of the group) of an item that the kernel wants, for the accumulators in L2.
    int (*prefill_rows)(const foveate_attention& call);
    int64_t (*prefill_scratch)(const foveate_attention& call, int rows);
    void (*prefill)(const foveate_attention& call, const PrefillItem& item, void* scratch);
    // The same where each query has units of its own; an item is for a KV head, and ``units`` may be chosen.
    int (*gathered_rows)(const foveate_attention& call);
    int64_t (*gathered_scratch)(const foveate_attention& call, int queries, int64_t units);
    void (*gathered)(const foveate_attention& call, const PrefillItem& item, void* scratch);
    int64_t (*decode_scratch)(const foveate_attention& call);
    void (*decode)(const foveate_attention& call, const DecodeItem& item, float* partial, void* scratch);
    void (*decode_merge)(const foveate_attention& call, int query, int kind, const float* partials, int parts);
    // Around the items of one thread.
    void (*begin)();
    void (*end)();
    // Decode where keys are chosen by a threshold: as above, and the floats that an item leaves for the merge.
    int64_t (*threshold_scratch)(const foveate_attention& call);
    void (*threshold)(const foveate_attention& call, const DecodeItem& item, float* partial, void* scratch);
    void (*threshold_merge)(const foveate_attention& call, int query, int kind, const float* partials, int parts);
    int64_t (*threshold_partial)(const foveate_attention& call);
};

// First query heads of an item, and how many share its keys.
inline int heads_per_kind(const foveate_attention& call) {
    return call.num_heads / (call.indices ? call.selected_heads : call.num_kv_heads);
}

// Units of a selection that begin within a context.
inline int64_t units_of(const foveate_attention& call, int64_t context) {
    return (context + call.granularity - 1) / call.granularity;
}

extern const IsaKernels* const kAvx2Kernels;        // [4]: by element type, and both again for pages of int8
extern const IsaKernels* const kAvx512Kernels;      // [4]
extern const IsaKernels* const kAvx512Bf16Kernels;  // [2]: pages of bfloat16, and of int8
extern const IsaKernels* const kAmxKernels;         // [2]
