// The C interface of rotating queries and keys, and writing keys and values into their pages. Plain data only, as in kernels.h; ``native/__init__.py``
// mirrors ``foveate_write`` field by field.
#pragma once

#include "kernels.h"

extern "C" {

// Tokens of one page stand together and in order, as a sequence appends them. Strides count elements.
struct foveate_write {
    const void* key;        // [T, G, D], the last dimension dense
    const void* value;
    const int64_t* slots;   // [T] page * page_size + offset; negative writes nowhere
    // Rotation of halves (arXiv:2104.09864 as ``transformers`` lays it out), or null ``cos``: the first ``rotary_dim``
    // channels of queries are rotated where they lie, and those of keys as they are written.
    void* query;            // [T, H, D], the last dimension dense
    const void* cos;        // [T, rotary_dim], dense
    const void* sin;
    void* keys;             // [P, G, page_size, D], dense; int8 where there are scales, else of ``dtype``
    void* values;
    float* key_scales;      // [P, G, page_size], dense, or null
    float* value_scales;
    // Statistics of the rows as they are read, [P, G, D] dense, or null. Offset 0 starts those of its page afresh,
    // and the first slot of a run those of the run.
    float* key_sum;
    float* key_min;
    float* key_max;
    float* value_sum;
    float* value_min;
    float* value_max;
    float* key_sum_16;      // of runs of 16 tokens, [P, G, page_size / 16, D] dense, or null
    int64_t query_token_stride;
    int64_t query_head_stride;
    int64_t key_token_stride;
    int64_t key_head_stride;
    int64_t value_token_stride;
    int64_t value_head_stride;
    int64_t num_tokens;
    int64_t num_pages;
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim;       // a multiple of 16, at most 512
    int32_t rotary_dim;     // a multiple of 16, at most head_dim
    int32_t page_size;
    int32_t dtype;          // of query, key, value, cos and sin
    int32_t num_threads;
};

// 0, or 1 when a slot lies behind the last page; then nothing was written.
FOVEATE_API int32_t foveate_write_run(const foveate_write* call);

FOVEATE_API int32_t foveate_write_size(void);
}

struct WriteKernels {
    // Writes the rows of one KV head, keys or values.
    void (*rows)(const foveate_write& call, int head, bool values);
    // Rotates the rows of one query head.
    void (*rotate)(const foveate_write& call, int head);
};
extern const WriteKernels kWriteAvx2;
