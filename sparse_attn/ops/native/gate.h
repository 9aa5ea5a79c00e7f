// The C interface of MoBA's gate, and what each instruction set offers for it. Plain data only, as in kernels.h;
// ``native/__init__.py`` mirrors ``foveate_gate`` field by field.
#pragma once

#include "kernels.h"

extern "C" {

// For each query and choosing head: its own block, and the past blocks with the highest ``q . mean``, the latest of
// equals. One sequence; K is H, or G where the heads of a group choose together.
struct foveate_gate {
    const void* query;           // [T, H, D], the last dimension dense
    const float* means;          // [G, U, D], dense
    const int32_t* first;        // [T] blocks first..end-1 may be chosen
    const int32_t* end;          // [T] at most U and the own block
    int32_t* indices;            // [T, K, top_k] ascending, padded by -1
    int32_t* counts;             // [T, K]
    int64_t query_token_stride;  // elements
    int64_t query_head_stride;
    int64_t queries;             // T
    int64_t position;            // of the first query
    int64_t blocks;              // U
    int64_t block_tokens;
    int64_t top_k;               // own block included
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t kinds;               // K
    int32_t head_dim;
    int32_t dtype;
    int32_t isa;
    int32_t num_threads;
};

// 0, or 1 when no memory was left.
FOVEATE_API int32_t foveate_gate_run(const foveate_gate* call);

FOVEATE_API int32_t foveate_gate_size(void);
}

struct GateKernels {
    int columns;  // queries of an item
    int64_t (*scratch)(const foveate_gate& call);
    void (*choose)(const foveate_gate& call, int64_t first_query, int kind, void* scratch);
};

extern const GateKernels* const kGateAvx2;    // [2], by element type
extern const GateKernels* const kGateAvx512;  // [2]
