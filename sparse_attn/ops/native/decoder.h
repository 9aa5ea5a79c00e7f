// The C interface of decoder layers in a decode step: a norm, the projections, what whole.h does, and what follows
// attention, in one call for several layers, or in two for one with a choice of keys between them.
// ``native/__init__.py`` mirrors ``foveate_decoder`` field by field.
#pragma once

#include "finish.h"
#include "whole.h"

extern "C" {

// What multiplies in the layer, without rows, inputs and outputs; everything in float32, but for ``heads`` and pages, which
// are of the step's type.
struct foveate_decoder {
    foveate_norm norm;
    foveate_product projections[3];  // of queries, keys and values; only the first where it makes them side by side
    foveate_norm query_norm;  // over the channels of a head, or of all heads; no width where there is none
    foveate_norm key_norm;
    foveate_finish finish;
};

// ``x [T, E]`` to ``heads``, in which the queries are rotated; keys and values are written. ``[T, H + 2 G, D]`` of one
// projection, ``[T, H, D]``, ``[T, G, D]`` and ``[T, G, D]`` of three; the strides of ``layer`` say the same. 0, 1 when no
// memory was left, or 2 when a slot lies behind the last page.
FOVEATE_API int32_t foveate_decoder_begin(const foveate_decoder* decoder, const foveate_whole_step* step,
                                          const foveate_whole_layer* layer, const float* x, void* heads);

// Reads what ``choice`` names, or every key where it is null, and goes on from ``x`` to ``out``, both ``[T, E]``, dense.
FOVEATE_API int32_t foveate_decoder_end(const foveate_decoder* decoder, const foveate_whole_step* step,
                                        const foveate_whole_layer* layer, const foveate_whole_choice* choice, void* heads,
                                        const float* x, float* out);

// Both, for layers that follow on each other; what each of them reads is known before, or is made as its choice says.
FOVEATE_API int32_t foveate_decoder_run(const foveate_decoder* const* decoders, const foveate_whole_step* step,
                                        const foveate_whole_layer* const* layers,
                                        const foveate_whole_choice* const* choices, int64_t count, const float* x,
                                        float* out);

FOVEATE_API int32_t foveate_decoder_size(void);
}
