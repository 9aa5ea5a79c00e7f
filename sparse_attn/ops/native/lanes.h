// What choosing keys by their score needs beside simd.h: masks of lanes; and the compensation for those left out.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

FOVEATE_INLINE uint64_t first_bits(int64_t count) {
    return count >= 64 ? ~uint64_t(0) : count > 0 ? (uint64_t(1) << count) - 1 : 0;
}

// A number that ascends with one that is not negative; all NaN, of any sign, are equal and above the rest.
constexpr int32_t kNanOrder = 0x7fc00000;

FOVEATE_INLINE int32_t order_of(float x) {
    int32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    bits &= 0x7fffffff;
    return bits < kNanOrder ? bits : kNanOrder;
}

template <class S>
struct Lanes;

template <>
struct Lanes<Vec8> {
    using M = __m256;
    // True of what is not a number too, which is to be read and told.
    static FOVEATE_INLINE M above(__m256 a, __m256 b) { return _mm256_cmp_ps(a, b, _CMP_NLE_UQ); }
    static FOVEATE_INLINE M above(__m256i a, __m256i b) { return _mm256_castsi256_ps(_mm256_cmpgt_epi32(a, b)); }
    static FOVEATE_INLINE M either(M a, M b) { return _mm256_or_ps(a, b); }
    static FOVEATE_INLINE M both(M a, M b) { return _mm256_and_ps(a, b); }
    static FOVEATE_INLINE __m256 keep(M mask, __m256 x) { return _mm256_and_ps(mask, x); }  // 0 elsewhere
    static FOVEATE_INLINE __m256i count(M mask, __m256i total) {
        return _mm256_sub_epi32(total, _mm256_castps_si256(mask));
    }
    static FOVEATE_INLINE void store(int32_t* p, __m256i x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
    }
    static FOVEATE_INLINE __m256i order(const float* p) {  // as order_of
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm256_min_epi32(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)), _mm256_set1_epi32(kNanOrder));
    }
    static FOVEATE_INLINE uint32_t bits(M mask) { return uint32_t(_mm256_movemask_ps(mask)); }
    static FOVEATE_INLINE M from_bits(uint32_t bits) {
        const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), lane), lane));
    }
};

#if defined(__AVX512F__)
template <>
struct Lanes<Vec16> {
    using M = __mmask16;
    static FOVEATE_INLINE M above(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
    static FOVEATE_INLINE M above(__m512i a, __m512i b) { return _mm512_cmpgt_epi32_mask(a, b); }
    static FOVEATE_INLINE M either(M a, M b) { return M(a | b); }
    static FOVEATE_INLINE M both(M a, M b) { return M(a & b); }
    static FOVEATE_INLINE __m512 keep(M mask, __m512 x) { return _mm512_maskz_mov_ps(mask, x); }
    static FOVEATE_INLINE __m512i count(M mask, __m512i total) {
        return _mm512_mask_add_epi32(total, mask, total, _mm512_set1_epi32(1));
    }
    static FOVEATE_INLINE void store(int32_t* p, __m512i x) { _mm512_storeu_si512(p, x); }
    static FOVEATE_INLINE __m512i order(const float* p) {
        const __m512i bits = _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(0x7fffffff));
        return _mm512_min_epi32(bits, _mm512_set1_epi32(kNanOrder));
    }
    static FOVEATE_INLINE uint32_t bits(M mask) { return mask; }
    static FOVEATE_INLINE M from_bits(uint32_t bits) { return M(bits); }
};
#endif

struct Compensated {
    float factor;  // of the sum over the values read
    float lost;    // probability left out
    float lse;     // of the logits read
};

// ``sum`` and ``dropped`` are sums of exp(logit - reference) over the keys read and left out of the query in row
// ``place`` of [T, H]; ``peak`` is its largest visible logit.
inline Compensated compensate(const foveate_attention& call, int64_t place, int head, int64_t position,
                              float reference, float peak, float sum, float dropped, int64_t count) {
    const foveate_threshold& threshold = *call.threshold;
    const int64_t first = position - call.farthest + 1 > 0 ? position - call.farthest + 1 : 0;
    const int64_t visible = position - call.nearest + 1 - first;
    float rest = 0.0f;
    // Where nothing is left out there is nothing to make up for, whatever was expected.
    if (count < visible) {
        if (threshold.dropped_sum == FOVEATE_DROPPED_EXACT) rest = dropped;
        if (threshold.dropped_sum == FOVEATE_DROPPED_BOUND)
            rest = float(visible - count) * std::exp(threshold.theta[place] - reference);
        if (threshold.dropped_sum == FOVEATE_DROPPED_GIVEN) rest = threshold.expected[place] * std::exp(peak - reference);
        rest *= threshold.dropped_scale;
    }
    const float whole = sum + rest;
    if (whole <= 0.0f) return {0.0f, 0.0f, -kInfinity};  // NaN goes on
    float factor = 1.0f / whole;
    if (call.sinks) factor /= 1.0f + std::exp(call.sinks[head] - reference - std::log(whole));
    return {factor, factor > 0.0f ? rest * factor : 0.0f, sum <= 0.0f ? -kInfinity : reference + std::log(sum)};
}

}  // namespace
