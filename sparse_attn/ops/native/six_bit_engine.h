// Logits of int8 keys on AVX2 by products of bytes, for anchors alone, at 1.5 times the rate of words: queries are rounded
// to 6 bits.
//
// AVX2's product of bytes adds two of them in 16 bits, which hold four of 63 and 127; so 64 products take two of those
// instructions, one that widens, and two sums, where words take eight. Which keys are chosen hardly depends on the bits of
// queries: 7.157 % of the attention was not read instead of 7.154 with a tenth of the keys (Qwen2.5-Coder 1.5B, 3,072
// tokens; 7.167 with 5 bits), and 3.126 instead of 3.125 (SmolLM2-135M, 4,096 tokens).
#pragma once

#include "byte_queries.h"
#include "prefill.h"

namespace {

template <class Result>
class SixBitEngine {
public:
    using Simd = Vec8;
    using T = Result;
    using Row = int8_t;
    static constexpr int W = Simd::W;
    static constexpr int kVectors = 3;
    static constexpr int kBlock = 64;
    static constexpr bool kPairs = false;
    static constexpr bool kBytes = true;
    static constexpr bool kWords = false;

    // Fours of bytes, and what a level is worth.
    static constexpr int units(int dim) { return dim / 4 + 1; }
    static int64_t scratch(int) { return 0; }
    static void pack(const T* const* source, int dim, float* target) {
        pack_bytes<Lanes8<WordDot>, 31, kExcess>(source, dim, target);
    }

    SixBitEngine(void*, int dim) : dim_(dim) {}

    // What is too much in every channel of a query comes to.
    void load_keys(const KeyBlock<Row>& block) {
        for (int k = 0; k < block.count; k += 4) {
            __m256i sums[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const int8_t* key = block.keys[smaller(k + i, block.count - 1)];
                sums[i] = _mm256_setzero_si256();
                for (int d = 0; d < dim_; d += 16) {
                    const __m256i words = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(key + d)));
                    sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(words, _mm256_set1_epi16(kExcess)));
                }
            }
            const __m256i halves = sum_quads(sums);
            _mm_store_si128(reinterpret_cast<__m128i*>(excess_ + k),
                            _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1)));
        }
    }

    void logits(const KeyBlock<Row>& block, const float* queries, float* out, int first, int last) const {
        multiply(block, queries, out, first, last);
    }

private:
    static constexpr char kExcess = 32;
    static constexpr int kKeys = 2;  // with three GCC runs out of registers

    // Not inlined: in a larger function GCC spills the sums. Every loop over them is unrolled for the same reason.
    __attribute__((noinline)) void multiply(const KeyBlock<Row>& block, const float* queries, float* out, int first,
                                            int last) const {
        const int fours = dim_ / 4;
        const int64_t vector = int64_t(units(dim_)) * W;
        for (int k = first; k < last; k += kKeys) {
            const int8_t* a[kKeys];
            int at[kKeys];
            __m256i sums[kKeys][kVectors];
#pragma GCC unroll 4
            for (int r = 0; r < kKeys; ++r) {
                at[r] = smaller(k + r, last - 1);
                a[r] = block.keys[at[r]];
#pragma GCC unroll 4
                for (int c = 0; c < kVectors; ++c) sums[r][c] = _mm256_set1_epi32(-excess_[at[r]]);
            }
            for (int u = 0; u < fours; u += 2) {
                __m256i keys[kKeys][2];
#pragma GCC unroll 4
                for (int r = 0; r < kKeys; ++r)
#pragma GCC unroll 2
                    for (int i = 0; i < 2; ++i) keys[r][i] = _mm256_set1_epi32(four_bytes(a[r] + 4 * (u + i)));
#pragma GCC unroll 4
                for (int c = 0; c < kVectors; ++c) {
                    __m256i left = load(queries + u * W + c * vector), right = load(queries + (u + 1) * W + c * vector);
                    FOVEATE_HOLD(left);  // or GCC loads them for each key
                    FOVEATE_HOLD(right);
#pragma GCC unroll 4
                    for (int r = 0; r < kKeys; ++r) {
                        const __m256i words = _mm256_add_epi16(_mm256_maddubs_epi16(left, keys[r][0]),
                                                               _mm256_maddubs_epi16(right, keys[r][1]));
                        add_products(sums[r][c], words, _mm256_set1_epi16(1));
                    }
                }
            }
#pragma GCC unroll 4
            for (int c = 0; c < kVectors; ++c) {
                const __m256 worth = Vec8::load(queries + fours * W + c * vector);
#pragma GCC unroll 4
                for (int r = 0; r < kKeys; ++r) {
                    const __m256 scale = Vec8::mul(worth, Vec8::set(block.key_scales[at[r]]));
                    Vec8::store(out + (int64_t(c) * kBlock + k + r) * W, Vec8::mul(_mm256_cvtepi32_ps(sums[r][c]), scale));
                }
            }
        }
    }

    static FOVEATE_INLINE __m256i load(const float* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

    const int dim_;
    alignas(16) int32_t excess_[kBlock];
};

}  // namespace
