// RMS norms of one instruction set: two passes over a row that lies in L1 after the first.
#pragma once

#include <cmath>

#include "norm.h"
#include "simd.h"

namespace {

// To the element type and back: models round before they multiply by the weight.
template <class Vec, class T>
FOVEATE_INLINE typename Vec::F rounded(typename Vec::F x) {
    T held[Vec::W];
    Vec::store(held, x);
    return Vec::load(held);
}

template <class Vec, class T>
FOVEATE_INLINE typename Vec::F scaled(typename Vec::F x, float factor, typename Vec::F weight, bool from_one) {
    const typename Vec::F normal = Vec::mul(x, Vec::set(factor));
    if (from_one) return Vec::mul(normal, Vec::add(weight, Vec::set(1.0f)));
    return Vec::mul(rounded<Vec, T>(normal), weight);
}

template <class Vec, class T>
void norm_rows(const foveate_norm& call, int64_t first, int64_t last) {
    constexpr int W = Vec::W;
    using F = typename Vec::F;
    const int64_t width = call.width, whole = width / W * W;
    const size_t rest = size_t(width - whole) * sizeof(T);
    const T* weight = static_cast<const T*>(call.weight);
    T last_weights[W] = {};
    __builtin_memcpy(last_weights, weight + whole, rest);
    for (int64_t row = first; row < last; ++row) {
        const T* x = static_cast<const T*>(call.input) + row * call.input_stride;
        T* out = static_cast<T*>(call.out) + row * width;
        T tail[W] = {};
        __builtin_memcpy(tail, x + whole, rest);
        F squares = Vec::mul(Vec::load(tail), Vec::load(tail)), more = Vec::zero();
        int64_t k = 0;
        for (; k + 2 * W <= whole; k += 2 * W) {
            const F a = Vec::load(x + k), b = Vec::load(x + k + W);
            squares = Vec::fma(a, a, squares);
            more = Vec::fma(b, b, more);
        }
        for (; k < whole; k += W) squares = Vec::fma(Vec::load(x + k), Vec::load(x + k), squares);
        const float factor = 1.0f / std::sqrt(Vec::sum(Vec::add(squares, more)) / float(width) + call.epsilon);
        for (k = 0; k < whole; k += W)
            Vec::store(out + k, scaled<Vec, T>(Vec::load(x + k), factor, Vec::load(weight + k), call.from_one));
        if (rest) {
            Vec::store(tail, scaled<Vec, T>(Vec::load(tail), factor, Vec::load(last_weights), call.from_one));
            __builtin_memcpy(out + whole, tail, rest);
        }
    }
}

}  // namespace
