// What follows attention in a decoder layer: fills in five calls, and runs them.
#include "finish.h"

#include "runtime.h"

namespace {

template <class Call>
Call filled(const Call& given, int64_t rows, int32_t num_threads) {
    Call call = given;
    call.rows = rows;
    call.num_threads = num_threads;
    return call;
}

}  // namespace

extern "C" {

int32_t foveate_finish_size(void) { return int32_t(sizeof(foveate_finish)); }

int32_t foveate_finish_run(const foveate_finish* finish, const float* attended, const float* x, float* out, int64_t rows,
                           int32_t num_threads) {
    const int64_t width = finish->norm.width, inner = finish->glu.width;
    float* memory = static_cast<float*>(foveate_scratch(rows * (2 * width + 3 * inner) * int64_t(sizeof(float)), 2));
    if (!memory) return 1;
    float* sum = memory;
    float* normed = sum + rows * width;
    float* gates = normed + rows * width;
    float* gated = gates + rows * 2 * inner;

    if (multiply(finish->output, attended, x, sum, rows, num_threads)) return 1;
    foveate_norm norm = filled(finish->norm, rows, num_threads);
    norm.input = sum;
    norm.input_stride = width;
    norm.out = normed;
    foveate_norm_run(&norm);
    if (multiply(finish->gates, normed, nullptr, gates, rows, num_threads)) return 1;
    foveate_glu glu = filled(finish->glu, rows, num_threads);
    glu.gate = gates;
    glu.up = gates + inner;
    glu.input_stride = 2 * inner;
    glu.out = gated;
    foveate_glu_run(&glu);
    return multiply(finish->down, gated, sum, out, rows, num_threads);
}
}
