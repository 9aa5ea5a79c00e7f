// The C interface of a decode step: rotates, writes and attends in one call per layer, or in two with a choice of keys
// between them. ``native/__init__.py`` mirrors the structures field by field.
#pragma once

#include "anchor_call.h"
#include "kernels.h"
#include "pick.h"
#include "write.h"

extern "C" {

// What all layers of a step share. Fields that belong to a layer are left out of ``write`` and ``attention``.
struct foveate_whole_step {
    foveate_write write;
    foveate_attention attention;
    const int64_t* owners;  // [S] rows of ``keys_read``
    double* keys_read;      // [owners, 2]: key reads done, and those of dense attention; added to
};

struct foveate_whole_layer {
    void* keys;             // the pages of the layer, as in ``foveate_write``
    void* values;
    float* key_scales;
    float* value_scales;
    float* stats[7];        // key sum, min, max, value sum, min, max, and sums of 16 keys
    const float* sinks;
    int64_t query_token_stride;
    int64_t key_token_stride;
    int64_t value_token_stride;
    int32_t rotates;
    int32_t farthest;
    float scale;
    float softcap;
};

// What is read instead of every key of the layer's band: a selection, as in ``foveate_attention``. It may be made first:
// ranked by the layer's own queries and keys, then completed, then its rows given to heads; each step reads what the one
// before has written.
struct foveate_whole_choice {
    int32_t* indices;
    int32_t* counts;
    const int32_t* tile_sequence;
    const int32_t* tile_start;
    const int32_t* tile_count;
    const int32_t* tile_position;
    const foveate_anchor* rank;     // or null; without what the layer gives
    const foveate_selection* keep;  // or null
    const int32_t* from_indices;    // rows [R, from_heads] of which ``head_map [selected_heads]`` names one per head,
    const int32_t* from_counts;     // or null: ``indices`` and ``counts`` hold them already
    const int64_t* head_map;
    int64_t selected_width;
    int32_t num_tiles;
    int32_t selected_heads;
    int32_t granularity;
    int32_t from_heads;
    int32_t whole;  // every key is read all the same: others will read the selection
};

// ``query [T, H, D]``, ``key`` and ``value [T, G, D]``, the heads of a token dense; ``out [T, H, D]`` dense. Keys and
// values are written, unless they are null, and queries rotated where they lie; then, unless ``out`` is null, what
// ``choice`` names is read, or every key where it is null. 0, 1 when no memory was left, or 2 when a slot lies behind
// the last page.
FOVEATE_API int32_t foveate_whole_run(const foveate_whole_step* step, const foveate_whole_layer* layer,
                                      const foveate_whole_choice* choice, void* query, const void* key,
                                      const void* value, void* out);

FOVEATE_API int32_t foveate_whole_choice_size(void);

FOVEATE_API int32_t foveate_whole_step_size(void);
FOVEATE_API int32_t foveate_whole_layer_size(void);
}
