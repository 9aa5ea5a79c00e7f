// The C interface of what schemes learn of keys without attending: sums of runs of keys, and the largest logit that a
// page can hold. Plain data only, as in kernels.h; ``native/__init__.py`` mirrors ``foveate_scan`` field by field.
#pragma once

#include "kernels.h"

extern "C" {

struct foveate_scan {
    const void* query;            // bounds: [S, H, D], the last dimension dense
    const void* keys;             // sums: [P, G, page_size, D], dense
    const float* key_scales;      // [P, G, page_size], dense, where keys are int8; else null
    const float* sums;            // sums: [P, G, page_size / 16, D] of each 16 keys, dense, or null
    const float* low;             // bounds: [P, G, D] smallest and largest channels of each page
    const float* high;
    const int32_t* block_tables;  // [S, table_stride]
    const int32_t* context_lens;  // [S]
    const int64_t* start;         // sums: [S, runs] first position, and number of keys
    const int64_t* length;
    float* out;                   // sums: [S, runs, G, D]; bounds: [S, H, pages], -inf for pages without keys
    int64_t query_token_stride;
    int64_t query_head_stride;
    int64_t table_stride;
    int64_t runs;
    int64_t pages;
    int32_t num_sequences;
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim;             // a multiple of 16, at most 512
    int32_t page_size;
    int32_t dtype;                // of the query, and of keys without scales
    int32_t isa;
    int32_t num_threads;
};

FOVEATE_API int32_t foveate_scan_sums(const foveate_scan* call);

FOVEATE_API int32_t foveate_scan_bounds(const foveate_scan* call);

FOVEATE_API int32_t foveate_scan_size(void);
}

struct ScanKernels {
    // Run ``run`` of a sequence, all KV heads.
    void (*sums)(const foveate_scan& call, int sequence, int64_t run);
    // Pages first..last of a sequence under one KV head.
    void (*bounds)(const foveate_scan& call, int sequence, int kv_head, int64_t first, int64_t last);
};

extern const ScanKernels* const kScanAvx2;    // [2], by element type
extern const ScanKernels* const kScanAvx512;  // [2]
