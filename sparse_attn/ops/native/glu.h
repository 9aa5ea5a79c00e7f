// The C interface of gated activations, and what each instruction set offers for them. Plain data only, as in
// kernels.h; ``native/__init__.py`` mirrors ``foveate_glu`` field by field.
#pragma once

#include "kernels.h"

extern "C" {

enum foveate_activation : int32_t { FOVEATE_SILU = 0, FOVEATE_GELU_TANH = 1 };

// out = activation(gate) * up, computed in float32 and rounded once.
struct foveate_glu {
    const void* gate;      // [M, K], rows ``input_stride`` elements apart
    const void* up;        // likewise
    void* out;             // [M, K], dense
    int64_t input_stride;
    int64_t rows;
    int64_t width;
    int32_t activation;
    int32_t dtype;         // of all three
    int32_t isa;
    int32_t num_threads;
};

FOVEATE_API int32_t foveate_glu_run(const foveate_glu* call);

FOVEATE_API int32_t foveate_glu_size(void);
}

// Computes rows first..last.
typedef void (*GluRows)(const foveate_glu& call, int64_t first, int64_t last);

extern const GluRows* const kGluAvx2;    // [2], by element type
extern const GluRows* const kGluAvx512;  // [2]
