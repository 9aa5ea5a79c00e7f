// The C interface of RMS norms, and what each instruction set offers for them. Plain data only, as in kernels.h;
// ``native/__init__.py`` mirrors ``foveate_norm`` field by field.
#pragma once

#include "kernels.h"

extern "C" {

// out = input / sqrt(mean(input^2) + epsilon) * weight, each row for itself.
struct foveate_norm {
    const void* input;     // [M, K], rows ``input_stride`` elements apart
    void* out;             // [M, K], dense
    const void* weight;    // [K]
    int64_t input_stride;
    int64_t rows;
    int64_t width;
    float epsilon;
    int32_t from_one;      // the weight is what is added to one, and nothing is rounded before it is multiplied (Gemma)
    int32_t dtype;         // of all three
    int32_t isa;
    int32_t num_threads;
};

FOVEATE_API int32_t foveate_norm_run(const foveate_norm* call);

FOVEATE_API int32_t foveate_norm_size(void);
}

// Normalises rows first..last.
typedef void (*NormRows)(const foveate_norm& call, int64_t first, int64_t last);

extern const NormRows* const kNormAvx2;    // [2], by element type
extern const NormRows* const kNormAvx512;  // [2]
