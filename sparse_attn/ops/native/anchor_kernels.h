// What each instruction set offers for anchor scores.
#pragma once

#include "anchor_call.h"

// Of a block of keys and a head, in decode.
struct AnchorBlock {
    float reference;  // exponent that the weights are relative to
    float sum;        // of the weights
};

struct AnchorKernels {
    int64_t (*scratch)(const foveate_anchor& call, int tile);
    // Adds to ``scores``, which has room for the tile's last position rounded up to a multiple of 512.
    void (*pool)(const foveate_anchor& call, int tile, int kv_head, float* scores, void* scratch);
    // The same for tiles of one query, in two steps, of which ``add`` uses up the blocks; see anchor_decode.h.
    int64_t (*weights_scratch)(const foveate_anchor& call);
    void (*weights)(const foveate_anchor& call, int tile, int kv_head, int64_t first, int64_t last, float* weights,
                    AnchorBlock* blocks, int64_t width, void* scratch);
    void (*add)(const foveate_anchor& call, int kv_head, int64_t count, const float* weights, AnchorBlock* blocks,
                int64_t width, float* scores);
    int (*choose)(const float* scores, int64_t first, int64_t end, int64_t budget, int32_t* indices);
    // Around the items of one thread.
    void (*begin)();
    void (*end)();
};

extern const AnchorKernels* const kAnchorAvx2;        // [4]: by element type, and both again for pages of int8
extern const AnchorKernels* const kAnchorAvx512;      // [4]
extern const AnchorKernels* const kAnchorAvx512Bf16;  // [2]: pages of bfloat16, and of int8
extern const AnchorKernels* const kAnchorAmx;         // [2]
