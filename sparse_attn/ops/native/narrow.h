// The C interface of products with weights held in bfloat16, and what each instruction set offers for them. Plain data
// only, as in kernels.h; ``native/__init__.py`` mirrors ``foveate_narrow`` field by field.
//
// A token that is computed alone waits for the bytes of the weights, and a weight of a bfloat16 checkpoint says in two
// bytes what it says in four. They lie in panels of 16 output channels, [N/16][K][16], which one row reads from end to
// end, and many rows multiply without laying anything out anew: widening them is free beside the products.
#pragma once

#include "kernels.h"

extern "C" {

// out = input @ weight.T + bias + residual, computed in float32.
struct foveate_narrow {
    const float* input;     // [M, K], rows ``input_stride`` elements apart
    const void* weight;     // [N padded to 16, K] bfloat16, in panels
    const float* bias;      // [N padded to 16], or null
    const float* residual;  // [M, N], rows ``residual_stride`` elements apart, or null
    float* out;             // [M, N], dense
    int64_t input_stride;
    int64_t residual_stride;
    int64_t rows;
    int64_t in_channels;
    int64_t out_channels;
    int32_t isa;
    int32_t num_threads;
};

FOVEATE_API int32_t foveate_narrow_run(const foveate_narrow* call);

FOVEATE_API int32_t foveate_narrow_size(void);
}

constexpr int kNarrowPanel = 16;

// Computes rows row..last_row of the output channels of panels panel..last_panel.
typedef void (*NarrowBlock)(const foveate_narrow& call, int64_t row, int64_t last_row, int64_t panel, int64_t last_panel);

extern const NarrowBlock kNarrowAvx2;
extern const NarrowBlock kNarrowAvx512;
