// Queries of anchors rounded to bytes, for products with keys of int8 as they lie in their pages.
#pragma once

#include "columns.h"
#include "keys.h"
#include "linear_input.h"
#include "linear_lanes.h"

namespace {

// Rounds a row of a multiple of 16 channels to ``kLevels`` levels of its largest value either way, adds ``kExcess``, since
// one side of a product of bytes must be unsigned, fills up to whole stores, and returns what a level is worth; NaN if not
// all are finite.
template <class Lanes, int kLevels, int kExcess, class T>
FOVEATE_INLINE float round_to_bytes(const T* x, int dim, uint8_t* to) {
    using Vec = typename Lanes::Vec;
    using I = typename Vec::I;
    constexpr int W = Vec::W;
    I most = Vec::set_int(0);
    for (int d = 0; d < dim; d += W) most = Lanes::larger_magnitude(most, Vec::load(x + d));
    const LevelScale scale(Lanes::largest(most), float(kLevels));
    for (int d = 0; d < dim; d += 4 * W) {
        I levels[4];
        for (int i = 0; i < 4; ++i) {
            const int at = d + i * W;
            levels[i] = at < dim ? Lanes::to_int(Vec::mul(Vec::load(x + at), Vec::set(scale.steps))) : Vec::set_int(0);
            if (kExcess < 128) levels[i] = Lanes::add(levels[i], Vec::set_int(kExcess));
        }
        Lanes::store_bytes(to + d, levels, kExcess == 128);
    }
    return scale.worth;
}

// W rows as columns: fours of bytes, and what a level is worth.
template <class Lanes, int kLevels, int kExcess, class T>
void pack_bytes(const T* const* source, int dim, float* target) {
    using Vec = typename Lanes::Vec;
    constexpr int W = Vec::W;
    alignas(64) uint8_t rows[W][kMaxHeadDim];
    const uint8_t* turned[W];
    for (int lane = 0; lane < W; ++lane) {
        turned[lane] = rows[lane];
        target[dim / 4 * W + lane] = round_to_bytes<Lanes, kLevels, kExcess>(source[lane], dim, rows[lane]);
    }
    pack_columns<Units<Vec, uint8_t>>(turned, dim / 4, dim / 4, target);
}

}  // namespace
