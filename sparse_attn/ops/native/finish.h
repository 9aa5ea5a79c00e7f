// The C interface of what follows attention in a decoder layer, in one call: the output product, a norm and the gated MLP,
// each added to the residual stream. ``native/__init__.py`` mirrors ``foveate_finish`` field by field.
#pragma once

#include "glu.h"
#include "norm.h"
#include "product.h"

extern "C" {

// The five calls without their rows, inputs and outputs; everything in float32.
struct foveate_finish {
    foveate_product output;
    foveate_norm norm;
    foveate_product gates;  // both halves side by side
    foveate_glu glu;
    foveate_product down;
};

// sum = x + output(attended); out = sum + down(glu(gates(norm(sum)))). ``attended [M, H * D]``, ``x`` and ``out [M, E]``,
// dense. 0, or 1 when no memory was left.
FOVEATE_API int32_t foveate_finish_run(const foveate_finish* finish, const float* attended, const float* x, float* out,
                                       int64_t rows, int32_t num_threads);

FOVEATE_API int32_t foveate_finish_size(void);
}
