// Bytes and their dot products in 8 lanes (AVX2, AVX-VNNI) and 16 (AVX512-VNNI), for linear_dot.h.
#pragma once

#include "simd.h"

namespace {

FOVEATE_INLINE int32_t four_bytes(const void* p) {
    int32_t value;
    __builtin_memcpy(&value, p, 4);
    return value;
}

// Adds the products of words, two by two. Left to GCC, a sum goes to another register and is moved back: 6 moves to 24
// instructions of the loop in word_engine.h.
FOVEATE_INLINE void add_products(__m256i& sums, __m256i a, __m256i b) {
    const __m256i products = _mm256_madd_epi16(a, b);
    __asm__("vpaddd %1, %0, %0" : "+x"(sums) : "x"(products));
}

// Sums of four vectors, half by half. As for floats in decode_vectors.h.
FOVEATE_INLINE __m256i sum_quads(const __m256i (&r)[4]) {
    const __m256i a = _mm256_add_epi32(_mm256_unpacklo_epi32(r[0], r[1]), _mm256_unpackhi_epi32(r[0], r[1]));
    const __m256i b = _mm256_add_epi32(_mm256_unpacklo_epi32(r[2], r[3]), _mm256_unpackhi_epi32(r[2], r[3]));
    return _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
}

// Adds the products of four unsigned and four signed bytes to each sum. Left to GCC, it is the same as above: the 24 sums of
// multiply8 in linear_dot.h were moved 48 times, and 18 of them stored.
#if defined(__AVX512VNNI__)
FOVEATE_INLINE __m512i dot_bytes(__m512i sum, __m512i a, __m512i b) {
#if defined(FOVEATE_EMULATED)
    return _mm512_dpbusd_epi32(sum, a, b);
#else
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
#endif
}
#endif
#if defined(__AVXVNNI__)
FOVEATE_INLINE __m256i dot_bytes(__m256i sum, __m256i a, __m256i b) {
#if defined(FOVEATE_EMULATED)
    return _mm256_dpbusd_avx_epi32(sum, a, b);
#else
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
    return sum;
#endif
}
#endif

// 8 lanes; ``Dot`` says how four bytes are multiplied.
template <class Dot>
struct Lanes8 : Dot {
    using Vec = Vec8;
    using I = __m256i;
    static constexpr int kVectors = 2;

    static FOVEATE_INLINE I load(const void* p) { return _mm256_loadu_si256(static_cast<const I*>(p)); }
    static FOVEATE_INLINE I add(I a, I b) { return _mm256_add_epi32(a, b); }
    static FOVEATE_INLINE I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
    template <int kBits>
    static FOVEATE_INLINE I shift_left(I a) { return _mm256_slli_epi32(a, kBits); }
    template <int kBits>
    static FOVEATE_INLINE I shift_right(I a) { return _mm256_srai_epi32(a, kBits); }
    static FOVEATE_INLINE I to_int(__m256 x) { return _mm256_cvtps_epi32(x); }
    static FOVEATE_INLINE __m256 to_float(I x) { return _mm256_cvtepi32_ps(x); }
    static FOVEATE_INLINE I larger_magnitude(I most, __m256 x) {
        return _mm256_max_epu32(most, _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff)));
    }
    static FOVEATE_INLINE float largest(I most) {
        uint32_t lanes[8], top = 0;
        _mm256_storeu_si256(reinterpret_cast<I*>(lanes), most);
        for (uint32_t lane : lanes) top = larger(top, lane);
        float result;
        __builtin_memcpy(&result, &top, 4);
        return result;
    }
    // Four vectors of signed bytes, or the same plus 128.
    static FOVEATE_INLINE void store_bytes(uint8_t* p, const I (&x)[4], bool biased) {
        const I packed = _mm256_packs_epi16(_mm256_packs_epi32(x[0], x[1]), _mm256_packs_epi32(x[2], x[3]));
        const I ordered = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        const I bytes = _mm256_xor_si256(ordered, _mm256_set1_epi8(biased ? char(0x80) : char(0)));
        _mm256_storeu_si256(reinterpret_cast<I*>(p), bytes);
    }
    static FOVEATE_INLINE I low_nibbles(I x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
    static FOVEATE_INLINE I high_nibbles(I x) { return low_nibbles(_mm256_srli_epi16(x, 4)); }
    static FOVEATE_INLINE void store(void* p, I x) { _mm256_storeu_si256(static_cast<I*>(p), x); }
    static FOVEATE_INLINE I load_bytes(const uint8_t* p) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    }
};


// AVX2's own product of bytes saturates at 16 bits; products of words do not.
struct WordDot {
    static constexpr int kRows = 4;
    struct Pairs {
        __m256i even, odd;
    };
    using Weights = Pairs;
    using Inputs = Pairs;
    static FOVEATE_INLINE Weights weights(const void* p) {
        const __m256i w = _mm256_loadu_si256(static_cast<const __m256i*>(p));
        return {_mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), _mm256_srai_epi16(w, 8)};
    }
    static FOVEATE_INLINE Inputs inputs(const uint8_t* p) {
        const __m256i a = _mm256_set1_epi32(four_bytes(p));
        return {_mm256_and_si256(a, _mm256_set1_epi16(255)), _mm256_srli_epi16(a, 8)};
    }
    static FOVEATE_INLINE __m256i dot(__m256i sum, Inputs a, Weights w) {
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a.even, w.even));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(a.odd, w.odd));
    }
    static FOVEATE_INLINE __m256i dot_nibbles(__m256i sum, __m256i w, const uint8_t* p) {
        // 15 * 128 * 2 does not saturate.
        const __m256i words = _mm256_maddubs_epi16(w, _mm256_set1_epi32(four_bytes(p)));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
    }
};

#if defined(__AVXVNNI__)

struct VnniDot8 {
    static constexpr int kRows = 4;
    using Weights = __m256i;
    using Inputs = __m256i;
    static FOVEATE_INLINE Weights weights(const void* p) {
        return _mm256_loadu_si256(static_cast<const __m256i*>(p));
    }
    static FOVEATE_INLINE Inputs inputs(const uint8_t* p) { return _mm256_set1_epi32(four_bytes(p)); }
    static FOVEATE_INLINE __m256i dot(__m256i sum, Inputs a, Weights w) {
        return dot_bytes(sum, a, w);
    }
    static FOVEATE_INLINE __m256i dot_nibbles(__m256i sum, __m256i w, const uint8_t* p) {
        return dot_bytes(sum, w, inputs(p));
    }
};

#endif

#if defined(__AVX512VNNI__)

struct Lanes16 {
    using Vec = Vec16;
    using I = __m512i;
    using Weights = I;
    using Inputs = I;
    static constexpr int kVectors = 4, kRows = 6;

    static FOVEATE_INLINE I load(const void* p) { return _mm512_loadu_si512(p); }
    static FOVEATE_INLINE I add(I a, I b) { return _mm512_add_epi32(a, b); }
    static FOVEATE_INLINE I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
    template <int kBits>
    static FOVEATE_INLINE I shift_left(I a) { return _mm512_slli_epi32(a, kBits); }
    template <int kBits>
    static FOVEATE_INLINE I shift_right(I a) { return _mm512_srai_epi32(a, kBits); }
    static FOVEATE_INLINE I to_int(__m512 x) { return _mm512_cvtps_epi32(x); }
    static FOVEATE_INLINE __m512 to_float(I x) { return _mm512_cvtepi32_ps(x); }
    static FOVEATE_INLINE I larger_magnitude(I most, __m512 x) {
        return _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)));
    }
    static FOVEATE_INLINE float largest(I most) {
        const uint32_t top = _mm512_reduce_max_epu32(most);
        float result;
        __builtin_memcpy(&result, &top, 4);
        return result;
    }
    static FOVEATE_INLINE void store_bytes(uint8_t* p, const I (&x)[4], bool biased) {
        const I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        const I packed = _mm512_packs_epi16(_mm512_packs_epi32(x[0], x[1]), _mm512_packs_epi32(x[2], x[3]));
        const I bytes = _mm512_xor_si512(_mm512_permutexvar_epi32(order, packed),
                                         _mm512_set1_epi8(biased ? char(0x80) : char(0)));
        _mm512_storeu_si512(p, bytes);
    }
    static FOVEATE_INLINE I low_nibbles(I x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
    static FOVEATE_INLINE I high_nibbles(I x) { return low_nibbles(_mm512_srli_epi16(x, 4)); }
    static FOVEATE_INLINE void store(void* p, I x) { _mm512_storeu_si512(p, x); }
    static FOVEATE_INLINE I load_bytes(const uint8_t* p) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static FOVEATE_INLINE Weights weights(const void* p) { return _mm512_loadu_si512(p); }
    static FOVEATE_INLINE Inputs inputs(const uint8_t* p) { return _mm512_set1_epi32(four_bytes(p)); }
    static FOVEATE_INLINE I dot(I sum, Inputs a, Weights w) { return dot_bytes(sum, a, w); }
    static FOVEATE_INLINE I dot_nibbles(I sum, I w, const uint8_t* p) { return dot_bytes(sum, w, inputs(p)); }
};

#endif

}  // namespace
