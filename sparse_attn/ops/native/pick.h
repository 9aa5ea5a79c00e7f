// The C interface of choosing the best by their scores: units, and tokens chunk by chunk. Plain data only, as in
// kernels.h; ``native/__init__.py`` mirrors ``foveate_pick`` field by field.
#pragma once

#include "kernels.h"

extern "C" {

// Scores are ordered as their bits are once those of a negative one are turned round; -0 is 0, NaN beats all.
struct foveate_pick {
    const float* scores;    // [R, K, U], dense
    const int32_t* first;   // units: [R] candidates are the units first..end - 1
    const int32_t* end;
    const int64_t* start;   // walk: [R, U] first token of each chunk that may be taken, and how many
    const int64_t* length;
    const int64_t* limit;   // [R] units to choose, or tokens to take
    int32_t* indices;       // [R, K, width] ascending, padded by -1
    int32_t* counts;        // [R, K]
    int64_t rows;
    int64_t kinds;
    int64_t units;          // or chunks
    int64_t width;
    int32_t higher_ties;    // units: of two with equal scores the higher one is chosen first
    int32_t num_threads;
};

// 0, or 1 when no memory was left.
FOVEATE_API int32_t foveate_pick_units(const foveate_pick* call);

FOVEATE_API int32_t foveate_pick_walk(const foveate_pick* call);

FOVEATE_API int32_t foveate_pick_size(void);

// What is read beside a selection is added to it; and what it reads is counted.
struct foveate_selection {
    const int32_t* indices;  // [R, K, width] ascending; entries below 0 are none
    const int32_t* sinks;    // keep: [R] the units 0..sinks - 1 are added
    const int32_t* first;    // keep: [R] and the units first..last
    const int32_t* last;
    int32_t* kept;           // keep: [R, K, kept_width] ascending, without repeats, padded by -1
    int32_t* counts;         // keep: [R, K]
    const int32_t* tile_sequence;  // pairs: [R]
    const int32_t* tile_count;     // pairs: [R] queries, and the position of the first of them
    const int32_t* tile_position;
    double* pairs;           // pairs: [S] (query, key) pairs within the band, summed over K; added to
    int64_t rows;
    int64_t kinds;
    int64_t width;
    int64_t kept_width;
    int64_t granularity;
    int64_t nearest;         // as in ``foveate_attention``
    int64_t farthest;
};

FOVEATE_API int32_t foveate_selection_keep(const foveate_selection* call);

FOVEATE_API int32_t foveate_selection_pairs(const foveate_selection* call);

FOVEATE_API int32_t foveate_selection_size(void);
}
