// Rows rounded to 16 bits, for AVX2's products of words: with keys of int8 they take two instructions for 16 channels,
// where widening to floats takes as many for 8.
#pragma once

#include "linear_input.h"
#include "linear_lanes.h"

namespace {

// Rounds a row of a multiple of 16 channels to levels of its largest value, and returns what a level is worth; NaN if
// not all are finite.
template <class T>
FOVEATE_INLINE float round_to_words(const T* x, int dim, int16_t* to) {
    using Lanes = Lanes8<WordDot>;
    constexpr int W = Vec8::W;
    __m256i most = _mm256_setzero_si256();
    for (int d = 0; d < dim; d += W) most = Lanes::larger_magnitude(most, Vec8::load(x + d));
    const LevelScale scale(Lanes::largest(most), kLevels16);
    const Vec8::F steps = Vec8::set(scale.steps);
    for (int d = 0; d < dim; d += 2 * W) {
        const __m256i low = Lanes::to_int(Vec8::mul(Vec8::load(x + d), steps));
        const __m256i high = Lanes::to_int(Vec8::mul(Vec8::load(x + d + W), steps));
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + d), packed);
    }
    return scale.worth;
}

// 16 channels of int8.
FOVEATE_INLINE void widen_to_words(const int8_t* from, int16_t* to) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_cvtepi8_epi16(bytes));
}

}  // namespace
