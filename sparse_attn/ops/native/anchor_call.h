// The C interface of anchor scores: exact attention probabilities, pooled over tiles of queries. Plain data only, as in
// kernels.h; ``native/__init__.py`` mirrors ``foveate_anchor`` field by field.
#pragma once

#include "kernels.h"

extern "C" {

// For each tile and KV head: the probability of each key, normalised per query head over every key that it sees, and
// summed over the tile's queries and the head's group. Then the keys with the most of it, the earliest of equals.
struct foveate_anchor {
    foveate_attention attention;  // tile_* give R tiles; ``values``, ``out``, ``lse`` and ``indices`` are not used
    const int32_t* first;         // [R] keys first..end-1 may be chosen
    const int32_t* end;           // [R]
    const int32_t* budgets;       // [R] most keys to choose
    float* scores;                // [R, K, score_width], or null; K is 1 where all heads are pooled, else G
    int32_t* indices;             // [R, K, index_width] ascending, padded by -1; or null
    int32_t* counts;              // [R, K]
    int64_t score_width;          // at least the position of each tile's last query + 1
    int64_t index_width;
    int64_t query_step;           // from one query of a tile to the next, in rows and in positions
    int32_t pool_all;
};

// One more than the position of a tile's last query.
static inline int64_t end_of(const foveate_anchor& call, int tile) {
    const foveate_attention& attention = call.attention;
    return attention.tile_position[tile] + (attention.tile_count[tile] - 1) * call.query_step + 1;
}

// 0, or 1 when no memory was left.
FOVEATE_API int32_t foveate_anchor_run(const foveate_anchor* call);

FOVEATE_API int32_t foveate_anchor_size(void);
}
