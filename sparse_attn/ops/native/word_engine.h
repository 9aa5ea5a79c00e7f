// Logits of int8 keys on AVX2 by products of words, which go 1.6 times as fast as those of floats.
//
// A key is widened to words once per block, and a query rounded to 16 bits once per item: its error is a hundredth of
// what rounding the keys cost. Sums of products of 127 and 32,512 over 512 channels fit 32 bits. Values stay in float32
// here; for those see word_values.h.
#pragma once

#include "fma_engine.h"
#include "words.h"

namespace {

template <class Result>
struct WordEngine : FmaEngine<Vec8, Result, int8_t> {
    using Base = FmaEngine<Vec8, Result, int8_t>;
    using Base::dim_, Base::kBlock, Base::kVectors, Base::W;
    using T = Result;
    using Row = int8_t;

    // Pairs of words, and what a level is worth.
    static constexpr int units(int dim) { return dim / 2 + 1; }

    static void pack(const T* const* source, int dim, float* target) {
        alignas(32) int16_t rows[W][kMaxHeadDim];
        const int16_t* turned[W];
        for (int lane = 0; lane < W; ++lane) {
            turned[lane] = rows[lane];
            target[dim / 2 * W + lane] = round_to_words(source[lane], dim, rows[lane]);
        }
        pack_columns<Units<Vec8, int16_t>>(turned, dim / 2, dim / 2, target);
    }

    WordEngine(void* memory, int dim) : Base(memory, dim), words_(reinterpret_cast<int16_t*>(Base::wide_)) {}

    void load(const KeyBlock<Row>& block) {
        load_keys(block);
        Base::load_values(block);
    }

    void load_keys(const KeyBlock<Row>& block) {
        for (int i = 0; i < block.count; ++i)
            for (int d = 0; d < dim_; d += 16) widen_to_words(block.keys[i] + d, words_ + int64_t(i) * dim_ + d);
    }

    void logits(const KeyBlock<Row>& block, const float* queries, float* out, int first, int last) {
        int k = first;
        for (; k + kKeys <= last; k += kKeys) multiply<kKeys>(block, queries, out, k);
        for (; k < last; ++k) multiply<1>(block, queries, out, k);
    }

private:
    static constexpr int kKeys = 3;  // 9 of 16 registers are sums, which leaves room for the products

    // Not inlined: in a larger function GCC spills the sums. Every loop over them is unrolled for the same reason.
    template <int R>
    __attribute__((noinline)) void multiply(const KeyBlock<Row>& block, const float* queries, float* out, int key) const {
        const int pairs = dim_ / 2;
        const int64_t vector = int64_t(units(dim_)) * W;
        const int16_t* a = words_ + int64_t(key) * dim_;
        __m256i acc[R][kVectors];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int c = 0; c < kVectors; ++c) acc[r][c] = _mm256_setzero_si256();
#pragma GCC unroll 2
        for (int u = 0; u < pairs; ++u) {
            __m256i column[kVectors];
#pragma GCC unroll 4
            for (int c = 0; c < kVectors; ++c)
                column[c] = _mm256_castps_si256(Vec8::load(queries + u * W + c * vector));
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const __m256i pair = _mm256_set1_epi32(four_bytes(a + r * dim_ + 2 * u));
#pragma GCC unroll 4
                for (int c = 0; c < kVectors; ++c) add_products(acc[r][c], pair, column[c]);
            }
        }
#pragma GCC unroll 4
        for (int c = 0; c < kVectors; ++c) {
            const __m256 worth = Vec8::load(queries + pairs * W + c * vector);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
                Vec8::store(out + (int64_t(c) * kBlock + key + r) * W,
                            Vec8::mul(_mm256_cvtepi32_ps(acc[r][c]),
                                      Vec8::mul(worth, Vec8::set(block.key_scales[key + r]))));
        }
    }

    int16_t* words_;  // [kBlock][dim]
};

}  // namespace
