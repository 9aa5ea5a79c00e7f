// Rows of queries turned into columns, for the engines of prefill.h.
#pragma once

#include "simd.h"

namespace {

// Copies the first ``filled`` units of W query rows into the columns of one vector, ``target [units][W]``.
template <class Engine>
FOVEATE_INLINE void pack_columns(const typename Engine::T* const* source, int filled, int units, float* target) {
    using Simd = typename Engine::Simd;
    constexpr int W = Simd::W;
    int u = 0;
    for (; u + W <= filled; u += W) {
        typename Simd::F tile[W];
        for (int lane = 0; lane < W; ++lane) tile[lane] = Engine::load_units(source[lane], u);
        Simd::transpose(tile);
        for (int i = 0; i < W; ++i) Simd::store(target + (u + i) * W, tile[i]);
    }
    for (; u < filled; ++u)
        for (int lane = 0; lane < W; ++lane) target[u * W + lane] = Engine::load_unit(source[lane], u);
    for (; u < units; ++u) Simd::store(target + u * W, Simd::zero());
}

// For ``pack_columns``: rows of elements of which several make a unit of 32 bits.
template <class S, class Element>
struct Units {
    using Simd = S;
    using T = Element;
    static constexpr int kElements = 4 / sizeof(Element);
    static FOVEATE_INLINE typename S::F load_units(const Element* row, int unit) {
        return S::load(reinterpret_cast<const float*>(row + kElements * unit));
    }
    static FOVEATE_INLINE float load_unit(const Element* row, int unit) {
        float bits;
        __builtin_memcpy(&bits, row + kElements * unit, 4);
        return bits;
    }
};

}  // namespace
