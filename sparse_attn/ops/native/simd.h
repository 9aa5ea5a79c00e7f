// The few vector operations that the kernels need, in 8 lanes (AVX2) and 16 (AVX-512).
//
// Everything below the C interface lives in anonymous namespaces: each instruction set is its own translation unit,
// and a function that two of them shared could end up compiled for the wrong one.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstddef>
#include <cstdint>

#define FOVEATE_INLINE inline __attribute__((always_inline))

// Keeps a vector in a register; one of emulated instructions has none.
#if defined(FOVEATE_EMULATED)
#define FOVEATE_HOLD(vector) __asm__("" : "+m"(vector))
#else
#define FOVEATE_HOLD(vector) __asm__("" : "+v"(vector))
#endif

namespace {

using bfloat16 = uint16_t;

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kInfinity = __builtin_inff();

template <class T>
FOVEATE_INLINE T smaller(T a, T b) { return b < a ? b : a; }
template <class T>
FOVEATE_INLINE T larger(T a, T b) { return a < b ? b : a; }
FOVEATE_INLINE int round_up(int value, int step) { return (value + step - 1) / step * step; }

FOVEATE_INLINE float to_float(float value) { return value; }
FOVEATE_INLINE float to_float(bfloat16 value) {
    const uint32_t bits = uint32_t(value) << 16;
    float result;
    __builtin_memcpy(&result, &bits, 4);
    return result;
}

// 2^f for f in [0, 1), minimax in the relative error: 7.5e-8 where results are float32, and 7.5e-5 where they are
// rounded to bfloat16 anyway (2e-3), which saves a sixth of the softmax.
constexpr float kExp2Fine[6] = {0x1.fffffep-1f, 0x1.62e4f6p-1f, 0x1.ebd5a8p-3f,
                                0x1.c95446p-5f, 0x1.26900cp-7f, 0x1.ec320ap-10f};
constexpr float kExp2Coarse[4] = {0x1.fff632p-1f, 0x1.64444cp-1f, 0x1.cefc4cp-3f, 0x1.3f96a4p-4f};

struct Vec8 {
    static constexpr int W = 8;
    using F = __m256;
    using I = __m256i;

    static FOVEATE_INLINE F zero() { return _mm256_setzero_ps(); }
    static FOVEATE_INLINE F set(float x) { return _mm256_set1_ps(x); }
    static FOVEATE_INLINE I set_int(int32_t x) { return _mm256_set1_epi32(x); }
    static FOVEATE_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
    static FOVEATE_INLINE F load(const bfloat16* p) {
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    static FOVEATE_INLINE F load(const int8_t* p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    }
    static FOVEATE_INLINE I load_int(const int32_t* p) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    }
    static FOVEATE_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
    static FOVEATE_INLINE void store_past_caches(float* p, F x) { _mm256_stream_ps(p, x); }  // p: a multiple of W
    // 2^x up to a factor of 1 to 1.06: a float whose mantissa is x's fraction. ``x`` in units of 1 / kRoughUnit, kRoughZero
    // above what is meant. kRoughMean is the factor's mean where x falls anywhere between whole numbers.
    static constexpr float kRoughUnit = 1 << 23, kRoughZero = 127 << 23, kRoughMean = 1.0407f;
    static FOVEATE_INLINE F rough_exp2(F x) { return _mm256_castsi256_ps(_mm256_cvtps_epi32(max(x, zero()))); }
    // Four rows of non-negative floats as bytes: 5 bits of exponent and 3 of mantissa, so an error of up to a sixteenth. From
    // 2^-30, below which all are 0, to 2. The bits are as high in a float's as they can be read at once: see load_bytes.
    static constexpr int kBytesExponent = 96;  // of a float, where theirs is 0
    static FOVEATE_INLINE void store_bytes(uint8_t* p, const F (&rows)[4], bool past_caches) {  // p: a multiple of 32
        constexpr int32_t kLowest = kBytesExponent << 23, kHalf = 1 << 19;
        __m256i codes[4];
        for (int i = 0; i < 4; ++i)
            codes[i] = _mm256_srai_epi32(_mm256_sub_epi32(_mm256_castps_si256(rows[i]), set_int(kLowest - kHalf)), 20);
        const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(codes[0], codes[1]), _mm256_packs_epi32(codes[2], codes[3]));
        // Those without exponent would be denormal.
        const __m256i normal = _mm256_cmpeq_epi8(_mm256_max_epu8(bytes, _mm256_set1_epi8(8)), bytes);
        const __m256i kept = _mm256_and_si256(bytes, normal);
        if (past_caches) _mm256_stream_si256(reinterpret_cast<__m256i*>(p), kept);
        else _mm256_store_si256(reinterpret_cast<__m256i*>(p), kept);
    }
    // The rows times kBytesScale: their bytes become the lower exponent and the upper mantissa.
    static constexpr float kBytesScale = 0x1p-96f;  // 2^-kBytesExponent
    static FOVEATE_INLINE void load_bytes(const uint8_t* p, F (&rows)[4]) {
        const __m256i bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
        for (int i = 0; i < 4; ++i) {
            const char a = char(4 * i), b = char(a + 1), c = char(a + 2), d = char(a + 3), z = -1;
            const __m128i high = _mm_setr_epi8(z, z, z, a, z, z, z, b, z, z, z, c, z, z, z, d);
            const __m256i spread = _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(high));
            rows[i] = _mm256_castsi256_ps(_mm256_srli_epi32(spread, 4));
        }
    }
    static FOVEATE_INLINE void store(bfloat16* p, F x) {  // to nearest even
        const __m256i bits = _mm256_castps_si256(x);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), set_int(1));
        const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, set_int(0x7fff)));
        const __m256i high = _mm256_srli_epi32(up, 16);
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
    }
    static FOVEATE_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
    static FOVEATE_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static FOVEATE_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static FOVEATE_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
    static FOVEATE_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
    static FOVEATE_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
    static FOVEATE_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static FOVEATE_INLINE F fmsub(F a, F b, F c) { return _mm256_fmsub_ps(a, b, c); }
    static FOVEATE_INLINE bool any_above(F a, F b) {
        return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
    }
    static FOVEATE_INLINE uint32_t at_least(F a, F b) {  // a bit per lane
        return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
    }
    // x, or 0 where x is -inf.
    static FOVEATE_INLINE F finite(F x) { return _mm256_and_ps(x, _mm256_cmp_ps(x, set(-kInfinity), _CMP_GT_OQ)); }
    // s where low < position <= high, else -inf.
    static FOVEATE_INLINE F visible(F s, I position, I high, I low) {
        const __m256i hidden = _mm256_or_si256(_mm256_cmpgt_epi32(position, high),
                                               _mm256_cmpgt_epi32(_mm256_add_epi32(low, set_int(1)), position));
        return _mm256_blendv_ps(s, set(-kInfinity), _mm256_castsi256_ps(hidden));
    }
    static FOVEATE_INLINE F first_lanes(F s, int count) {  // the rest is -inf
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_blendv_ps(set(-kInfinity), s, _mm256_castsi256_ps(_mm256_cmpgt_epi32(set_int(count), lane)));
    }
    static FOVEATE_INLINE float sum(F x) {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
    }
    static FOVEATE_INLINE float highest(F x) {
        __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        half = _mm_max_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
    }
    template <bool kFine>
    static FOVEATE_INLINE F exp2(F x) {  // x <= 127; what would be denormal is 0
        const F whole = _mm256_floor_ps(x);
        const F f = _mm256_sub_ps(x, whole);
        F p;
        if (kFine) {
            p = fma(set(kExp2Fine[5]), f, set(kExp2Fine[4]));
            p = fma(p, f, set(kExp2Fine[3]));
            p = fma(p, f, set(kExp2Fine[2]));
            p = fma(p, f, set(kExp2Fine[1]));
            p = fma(p, f, set(kExp2Fine[0]));
        } else {
            p = fma(set(kExp2Coarse[3]), f, set(kExp2Coarse[2]));
            p = fma(p, f, set(kExp2Coarse[1]));
            p = fma(p, f, set(kExp2Coarse[0]));
        }
        const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
        const F scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
        return _mm256_and_ps(scaled, _mm256_cmp_ps(x, set(-125.0f), _CMP_NLT_UQ));  // NaN stays NaN
    }
    // Rows become columns.
    static FOVEATE_INLINE void transpose(F (&r)[8]) {
        F t[8], u[8];
        for (int i = 0; i < 4; ++i) {
            t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        for (int i = 0; i < 2; ++i) {
            u[4 * i + 0] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
            u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
            u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
            u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
        }
        for (int i = 0; i < 4; ++i) {
            r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
            r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
        }
    }
};

#if defined(__AVX512F__)

struct Vec16 {
    static constexpr int W = 16;
    using F = __m512;
    using I = __m512i;

    static FOVEATE_INLINE F zero() { return _mm512_setzero_ps(); }
    static FOVEATE_INLINE F set(float x) { return _mm512_set1_ps(x); }
    static FOVEATE_INLINE I set_int(int32_t x) { return _mm512_set1_epi32(x); }
    static FOVEATE_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
    static FOVEATE_INLINE F load(const bfloat16* p) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    static FOVEATE_INLINE F load(const int8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
    static FOVEATE_INLINE I load_int(const int32_t* p) { return _mm512_loadu_si512(p); }
    static FOVEATE_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    static FOVEATE_INLINE void store_past_caches(float* p, F x) { _mm512_stream_ps(p, x); }
    // As in Vec8.
    static constexpr float kRoughUnit = Vec8::kRoughUnit, kRoughZero = Vec8::kRoughZero, kRoughMean = Vec8::kRoughMean;
    static constexpr float kBytesScale = Vec8::kBytesScale;
    static FOVEATE_INLINE F rough_exp2(F x) { return _mm512_castsi512_ps(_mm512_cvtps_epi32(max(x, zero()))); }
    static FOVEATE_INLINE void store_bytes(uint8_t* p, const F (&rows)[4], bool past_caches) {  // p: a multiple of 64
        const __m512i lowest = set_int((Vec8::kBytesExponent << 23) - (1 << 19));
        __m512i codes[4];
        for (int i = 0; i < 4; ++i)
            codes[i] = _mm512_srai_epi32(_mm512_sub_epi32(_mm512_castps_si512(rows[i]), lowest), 20);
        const __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(codes[0], codes[1]), _mm512_packs_epi32(codes[2], codes[3]));
        const __m512i kept = _mm512_maskz_mov_epi8(_mm512_cmpge_epu8_mask(bytes, _mm512_set1_epi8(8)), bytes);
        if (past_caches) _mm512_stream_si512(reinterpret_cast<__m512i*>(p), kept);
        else _mm512_store_si512(p, kept);
    }
    static FOVEATE_INLINE void load_bytes(const uint8_t* p, F (&rows)[4]) {
        const __m512i bytes = _mm512_load_si512(p);
        for (int i = 0; i < 4; ++i) {
            const char a = char(4 * i), b = char(a + 1), c = char(a + 2), d = char(a + 3), z = -1;
            const __m128i high = _mm_setr_epi8(z, z, z, a, z, z, z, b, z, z, z, c, z, z, z, d);
            const __m512i spread = _mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(high));
            rows[i] = _mm512_castsi512_ps(_mm512_srli_epi32(spread, 4));
        }
    }
    static FOVEATE_INLINE void store(bfloat16* p, F x) {  // to nearest even
        const __m512i bits = _mm512_castps_si512(x);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), set_int(1));
        const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, set_int(0x7fff)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
    }
    static FOVEATE_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
    static FOVEATE_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static FOVEATE_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static FOVEATE_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
    static FOVEATE_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
    static FOVEATE_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
    static FOVEATE_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static FOVEATE_INLINE F fmsub(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }
    static FOVEATE_INLINE bool any_above(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
    static FOVEATE_INLINE uint32_t at_least(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
    static FOVEATE_INLINE F finite(F x) {
        return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, set(-kInfinity), _CMP_GT_OQ), x);
    }
    static FOVEATE_INLINE F visible(F s, I position, I high, I low) {
        const __mmask16 seen = _mm512_mask_cmpgt_epi32_mask(_mm512_cmple_epi32_mask(position, high), position, low);
        return _mm512_mask_mov_ps(set(-kInfinity), seen, s);
    }
    static FOVEATE_INLINE F first_lanes(F s, int count) {
        return _mm512_mask_mov_ps(set(-kInfinity), __mmask16(count >= 16 ? 0xffff : (1u << count) - 1), s);
    }
    static FOVEATE_INLINE float sum(F x) { return _mm512_reduce_add_ps(x); }
    static FOVEATE_INLINE float highest(F x) { return _mm512_reduce_max_ps(x); }
    template <bool kFine>
    static FOVEATE_INLINE F exp2(F x) {
        const F f = _mm512_reduce_ps(x, 0x09);  // x - floor(x); 0 for -inf
        F p;
        if (kFine) {
            p = fma(set(kExp2Fine[5]), f, set(kExp2Fine[4]));
            p = fma(p, f, set(kExp2Fine[3]));
            p = fma(p, f, set(kExp2Fine[2]));
            p = fma(p, f, set(kExp2Fine[1]));
            p = fma(p, f, set(kExp2Fine[0]));
        } else {
            p = fma(set(kExp2Coarse[3]), f, set(kExp2Coarse[2]));
            p = fma(p, f, set(kExp2Coarse[1]));
            p = fma(p, f, set(kExp2Coarse[0]));
        }
        return _mm512_scalef_ps(p, x);  // p * 2^floor(x)
    }
    static FOVEATE_INLINE void transpose(F (&r)[16]) {
        F t[16];
        for (int i = 0; i < 8; ++i) {
            t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        for (int i = 0; i < 4; ++i) {
            r[4 * i + 0] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
            r[4 * i + 1] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
            r[4 * i + 2] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
            r[4 * i + 3] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
        }
        for (int i = 0; i < 4; ++i) {
            t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
            t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
            t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
            t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
        }
        for (int i = 0; i < 4; ++i) {
            r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
            r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
            r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
            r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
        }
    }
};

#endif

}  // namespace
