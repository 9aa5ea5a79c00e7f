// Instructions that this CPU lacks, made of ones that it has: AVX-512, its VNNI and BF16, AVX-VNNI by SIMDe, which is
// found on the include path, and AMX by amx.h. Stands before the compiler's own header of this name.
#pragma once

// Sources see these (``cxx`` defines them), the headers below must not: they would take the real instructions.
#pragma push_macro("__AVX512F__")
#pragma push_macro("__AVX512VNNI__")
#pragma push_macro("__AVX512BF16__")
#pragma push_macro("__AVXVNNI__")
#undef __AVX512F__
#undef __AVX512VNNI__
#undef __AVX512BF16__
#undef __AVXVNNI__

#include_next <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>

#pragma pop_macro("__AVX512F__")
#pragma pop_macro("__AVX512VNNI__")
#pragma pop_macro("__AVX512BF16__")
#pragma pop_macro("__AVXVNNI__")

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "amx.h"

// What the instruction faults at is to be seen here too: addresses that are no multiple of 64.
template <class P>
inline P* emulated_aligned(P* p) {
    if (reinterpret_cast<uintptr_t>(p) % 64) {
        std::fprintf(stderr, "emulated AVX-512: an aligned vector at %p\n", static_cast<const void*>(p));
        std::abort();
    }
    return p;
}
#undef _mm512_load_ps
#undef _mm512_store_ps
#undef _mm512_load_si512
#undef _mm512_store_si512
#define _mm512_load_ps(p) simde_mm512_loadu_ps(emulated_aligned(p))
#define _mm512_store_ps(p, x) simde_mm512_storeu_ps(emulated_aligned(p), x)
#define _mm512_load_si512(p) simde_mm512_loadu_si512(emulated_aligned(p))
#define _mm512_store_si512(p, x) simde_mm512_storeu_si512(emulated_aligned(p), x)

// What SIMDe does not have; and of masked loads what lies behind the mask may be nobody's.

inline __m512i emulated_maskz_loadu_epi8(uint64_t held, const void* p) {
    const int8_t* from = static_cast<const int8_t*>(p);
    int8_t bytes[64] = {};
    for (int i = 0; i < 64; ++i)
        if (held >> i & 1) bytes[i] = from[i];
    __m512i result;
    std::memcpy(&result, bytes, sizeof(result));
    return result;
}
#undef _mm512_maskz_loadu_epi8
#define _mm512_maskz_loadu_epi8 emulated_maskz_loadu_epi8

#undef _mm512_stream_ps
#undef _mm512_stream_si512
#define _mm512_stream_ps(p, x) simde_mm512_storeu_ps(emulated_aligned(p), x)
#define _mm512_stream_si512(p, x) simde_mm512_storeu_si512(emulated_aligned(p), x)

// x less x rounded down to a whole number; what is infinite leaves 0.
template <int kControl>
inline __m512 emulated_reduce_ps(__m512 x) {
    static_assert(kControl == 0x09, "only rounding down to whole numbers is emulated");
    float lanes[16];
    std::memcpy(lanes, &x, sizeof(x));
    for (float& lane : lanes) lane = std::isinf(lane) ? 0.0f : lane - std::floor(lane);
    std::memcpy(&x, lanes, sizeof(x));
    return x;
}
#undef _mm512_reduce_ps
#define _mm512_reduce_ps(x, control) emulated_reduce_ps<control>(x)

// To nearest even; what is denormal becomes 0, as in the instruction.
inline uint16_t emulated_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    if (std::isnan(x)) return uint16_t(bits >> 16 | 0x40);
    if ((bits & 0x7f800000) == 0) return uint16_t(bits >> 16 & 0x8000);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

struct emulated_m256bh {
    uint16_t lanes[16];
};

inline emulated_m256bh emulated_cvtneps_pbh(__m512 x) {
    float wide[16];
    std::memcpy(wide, &x, sizeof(x));
    emulated_m256bh result;
    for (int i = 0; i < 16; ++i) result.lanes[i] = emulated_bfloat16(wide[i]);
    return result;
}
#undef _mm512_cvtneps_pbh
#define _mm512_cvtneps_pbh emulated_cvtneps_pbh
#undef __m256bh
#define __m256bh emulated_m256bh

inline __m512bh emulated_cvtne2ps_pbh(__m512 high, __m512 low) {
    const emulated_m256bh halves[2] = {emulated_cvtneps_pbh(low), emulated_cvtneps_pbh(high)};
    __m512bh result;
    static_assert(sizeof(result) == sizeof(halves), "32 numbers of 16 bits");
    std::memcpy(&result, halves, sizeof(result));
    return result;
}
#undef _mm512_cvtne2ps_pbh
#define _mm512_cvtne2ps_pbh emulated_cvtne2ps_pbh

#undef _mm256_dpbusd_avx_epi32
#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32
