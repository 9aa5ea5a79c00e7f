// Gated activations in the lanes of one instruction set.
#pragma once

#include "glu.h"
#include "simd.h"

namespace {

// x / (1 + exp(-z)): SiLU where z is x, and the tanh form of GELU where z is sqrt(8 / pi) (x + 0.044715 x^3).
template <class Vec>
FOVEATE_INLINE typename Vec::F activated(typename Vec::F x, bool gelu) {
    using F = typename Vec::F;
    constexpr float kGelu = 1.5957691216057308f, kCubic = 0.044715f;
    F z = x;
    if (gelu) z = Vec::mul(Vec::mul(x, Vec::set(kGelu)), Vec::fma(Vec::mul(x, x), Vec::set(kCubic), Vec::set(1.0f)));
    // exp2 takes no more than 127; a quotient by 2^126 is next to 0 already. min() gives its second operand for NaN.
    const F power = Vec::min(Vec::set(126.0f), Vec::mul(z, Vec::set(-kLog2E)));
    return Vec::div(x, Vec::add(Vec::set(1.0f), Vec::template exp2<true>(power)));
}

template <class Vec, class T>
void glu_rows(const foveate_glu& call, int64_t first, int64_t last) {
    constexpr int W = Vec::W;
    const int64_t width = call.width, whole = width / W * W;
    const size_t rest = size_t(width - whole) * sizeof(T);
    const bool gelu = call.activation == FOVEATE_GELU_TANH;
    for (int64_t row = first; row < last; ++row) {
        const T* gate = static_cast<const T*>(call.gate) + row * call.input_stride;
        const T* up = static_cast<const T*>(call.up) + row * call.input_stride;
        T* out = static_cast<T*>(call.out) + row * width;
        for (int64_t k = 0; k < whole; k += W)
            Vec::store(out + k, Vec::mul(activated<Vec>(Vec::load(gate + k), gelu), Vec::load(up + k)));
        if (rest) {
            T a[W] = {}, b[W] = {};
            __builtin_memcpy(a, gate + whole, rest);
            __builtin_memcpy(b, up + whole, rest);
            Vec::store(a, Vec::mul(activated<Vec>(Vec::load(a), gelu), Vec::load(b)));
            __builtin_memcpy(out + whole, a, rest);
        }
    }
}

}  // namespace
