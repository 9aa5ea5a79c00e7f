// One product with a layer's weights, however they are held, as the calls for whole decoder layers make it: float32 rows
// in and out. ``native/__init__.py`` mirrors ``foveate_product`` field by field.
#pragma once

#include "linear.h"
#include "narrow.h"

extern "C" {

// Exactly one of them is set, without rows, inputs and outputs.
struct foveate_product {
    const foveate_narrow* narrow;  // held in bfloat16
    const foveate_linear* linear;  // quantised
};
}

static inline int64_t in_channels_of(const foveate_product& product) {
    return product.narrow ? product.narrow->in_channels : product.linear->in_channels;
}

static inline int64_t out_channels_of(const foveate_product& product) {
    return product.narrow ? product.narrow->out_channels : product.linear->out_channels;
}

// out [M, N] = input [M, K] @ weight.T + bias, and ``residual`` [M, N] where it is not null; all dense. 0, or 1 when no
// memory was left.
static inline int32_t multiply(const foveate_product& product, const float* input, const float* residual, float* out,
                               int64_t rows, int32_t num_threads) {
    if (product.narrow) {
        foveate_narrow call = *product.narrow;
        call.input = input;
        call.input_stride = call.in_channels;
        call.residual = residual;
        call.residual_stride = call.out_channels;
        call.out = out;
        call.rows = rows;
        call.num_threads = num_threads;
        return foveate_narrow_run(&call);
    }
    foveate_linear call = *product.linear;
    call.input = input;
    call.input_stride = call.in_channels;
    call.out = out;
    call.rows = rows;
    call.dtype = FOVEATE_FLOAT32;
    call.num_threads = num_threads;
    const int32_t code = foveate_linear_run(&call);
    if (residual && !code)
        for (int64_t i = 0; i < rows * call.out_channels; ++i) out[i] += residual[i];
    return code;
}
