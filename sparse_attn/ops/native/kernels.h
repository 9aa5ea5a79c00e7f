// The C interface of the CPU attention kernels. Plain data only: the library is loaded by ctypes and knows no Python
// and no torch. ``__init__.py`` mirrors ``foveate_attention`` field by field.
//
// Letters: T tokens, S sequences, H query heads, G KV heads, D head dim, P pages, R selection rows (tiles).
#pragma once

#include <cstdint>

#define FOVEATE_API __attribute__((visibility("default")))

extern "C" {

enum foveate_dtype : int32_t { FOVEATE_FLOAT32 = 0, FOVEATE_BFLOAT16 = 1 };

// In order of preference: a later one is faster where the CPU has it.
enum foveate_isa : int32_t {
    FOVEATE_AVX2 = 0,        // FMA in float32; bfloat16 is widened
    FOVEATE_AVX512 = 1,      // the same, 16 lanes
    FOVEATE_AVX512BF16 = 2,  // dot products of bfloat16, and of bytes (VNNI)
    FOVEATE_AMX = 3,         // tiles of bfloat16 and of bytes
    FOVEATE_NUM_ISAS = 4,
};

// What stands in the softmax denominator for the keys left out.
enum foveate_dropped_sum : int32_t {
    FOVEATE_DROPPED_NONE = 0,
    FOVEATE_DROPPED_EXACT = 1,  // their true sum
    FOVEATE_DROPPED_BOUND = 2,  // their number times exp(theta)
    FOVEATE_DROPPED_GIVEN = 3,  // expected
};

// Keys chosen by their own score: read iff the logit exceeds theta, or the key is among the first ``sink_tokens`` or
// the last ``recent_tokens`` up to the query's own. Goes without a selection.
struct foveate_threshold {
    const float* theta;       // [T, H]
    const float* expected;    // [T, H] in units of the largest visible weight, or null
    const float* value_mean;  // [T, G, D] mean of the visible values, for prefill, or null
    const float* value_sums;  // [P, G, D] sums of the values of each page, for decode, or null
    int32_t* kept;            // [T, H] number of keys read; written
    int32_t dropped_sum;
    float dropped_scale;
    int32_t read_together;    // each head reads what any head of its KV head chose; decode only
    int32_t sink_tokens;
    int32_t recent_tokens;
};

// One attention call. Strides count elements. Nothing here is owned or changed but ``out``, ``lse``
// and ``threshold->kept``.
struct foveate_attention {
    const void* query;            // [T, H, D], the last dimension dense
    const void* keys;             // [P, G, page_size, D], dense
    const void* values;           // [P, G, page_size, D], dense
    const float* key_scales;      // [P, G, page_size], dense, where K and V are int8; null where they are of ``dtype``
    const float* value_scales;
    void* out;                    // [T, H, D], dense
    float* lse;                   // [T, H], dense: natural log-sum-exp without sinks
    const float* sinks;           // [H], or null
    const int32_t* block_tables;  // [S, table_stride]
    const int32_t* context_lens;  // [S]
    const int32_t* query_offsets; // [S + 1]
    // A selection, or null ``indices``: every key of the band.
    const int32_t* indices;       // [R, selected_heads, selected_width] ascending
    const int32_t* counts;        // [R, selected_heads]
    const int32_t* tile_sequence; // [R]
    const int32_t* tile_start;    // [R] first query of the tile, in the packed row
    const int32_t* tile_count;    // [R]
    const int32_t* tile_position; // [R] position of that query
    const foveate_threshold* threshold;  // or null
    int64_t query_token_stride;
    int64_t query_head_stride;
    int64_t table_stride;
    int64_t selected_width;
    int32_t num_sequences;
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim;
    int32_t page_size;
    int32_t num_tiles;
    int32_t selected_heads;       // G or H
    int32_t granularity;
    int32_t nearest;              // query i sees key j iff nearest <= i - j < farthest
    int32_t farthest;             // INT32_MAX: no end
    float scale;                  // > 0
    float softcap;                // 0: none
    int32_t dtype;                // of query and out
    int32_t isa;
    int32_t num_threads;
};

// Runs ``body(data)`` on ``num_threads`` threads, the caller's among them, and waits: the ABI of GOMP_parallel.
typedef void (*foveate_parallel)(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);

// Names torch's thread pool. Without one, and without threads of their own, the kernels run on the caller's thread.
FOVEATE_API void foveate_set_parallel(foveate_parallel parallel);

// From now on they run on threads of the library's own (pool.h), or no longer.
FOVEATE_API void foveate_keep_threads(int32_t keep);

// Was this instruction set compiled in, and do this CPU and its kernel have it? Asks for leave to use AMX.
FOVEATE_API int32_t foveate_has_isa(int32_t isa);

// Attention of prompt chunks. 0, or 1 when no memory was left.
FOVEATE_API int32_t foveate_prefill(const foveate_attention* call);

// Attention of one query per sequence. 0, or 1 when no memory was left.
FOVEATE_API int32_t foveate_decode(const foveate_attention* call);

// Size of ``foveate_attention``: the loader compares it with its own.
FOVEATE_API int32_t foveate_attention_size(void);

// The same of ``foveate_threshold``.
FOVEATE_API int32_t foveate_threshold_size(void);
}
