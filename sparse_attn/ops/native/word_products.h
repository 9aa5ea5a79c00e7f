// Decode over int8 pages on AVX2: logits by products of words.
//
// A head's query, rounded to 16 bits (words.h), meets the keys of a run, which were widened to words once for all heads.
// With 64 or 128 channels it lies in registers: a product and a sum are 1.8 instructions of 16 channels then, where one
// more fetches an operand if keys stay in registers or lie in lanes. Values stay in float32.
#pragma once

#include "decode_vectors.h"
#include "words.h"

namespace {

template <class Result>
class WordProducts : public VectorProducts<FloatRows<Vec8, Result, int8_t>> {
public:
    using Base = VectorProducts<FloatRows<Vec8, Result, int8_t>>;
    using T = Result;
    using Row = int8_t;

    WordProducts(Arena& arena, const foveate_attention& call) : Base(arena, call) {
        queries_ = arena.take<int16_t>(int64_t(group_) * dim_);
        worths_ = arena.take<float>(group_);
        words_ = arena.take<int16_t>(int64_t(kRun) * dim_);
    }

    void start(const T* query, int64_t head_stride) {
        Base::clear();
        for (int h = 0; h < group_; ++h)
            worths_[h] = round_to_words(query + h * head_stride, dim_, queries_ + int64_t(h) * dim_);
    }

    // weights[h][k] = query h times key k, without its scale.
    void logits(const KeyBlock<Row>& block, Ahead<Row>& ahead, float* weights) {
        if (dim_ == 64) runs<4>(block, ahead, weights);
        else if (dim_ == 128) runs<8>(block, ahead, weights);
        else runs<0>(block, ahead, weights);
    }

private:
    using Base::dim_, Base::group_;
    static constexpr int W = Vec8::W;
    static constexpr int kRun = 32;  // keys: 4 KiB of words at 64 channels, which stay in L1

    // ``kSteps`` times 16 channels, or any number if it is 0.
    template <int kSteps>
    void runs(const KeyBlock<Row>& block, Ahead<Row>& ahead, float* weights) const {
        for (int at = 0; at < block.count; at += kRun) {
            const int count = smaller(kRun, block.count - at);
            for (int k = 0; k < count; ++k) widen<kSteps>(block.keys[at + k], words_ + int64_t(k) * dim_);
            for (int h = 0; h < group_; ++h) {
                ahead.advance(count, group_);
                dot_products<kSteps>(h, count, weights + h * kDecodeBlock + at);
            }
        }
    }

    template <int kSteps>
    FOVEATE_INLINE void widen(const Row* key, int16_t* words) const {
        if constexpr (kSteps > 0) {
#pragma GCC unroll 8
            for (int s = 0; s < kSteps; ++s) widen_to_words(key + 16 * s, words + 16 * s);
        } else {
            for (int d = 0; d < dim_; d += 16) widen_to_words(key + d, words + d);
        }
    }

    static FOVEATE_INLINE __m256i load(const int16_t* words) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
    }

    // Of a head and a run of keys. Behind the last of them, up to a multiple of W, are others, whose products nobody reads.
    template <int kSteps>
    __attribute__((noinline)) void dot_products(int head, int count, float* weights) const {
        const int16_t* query = queries_ + int64_t(head) * dim_;
        const Vec8::F worth = Vec8::set(worths_[head]);
        __m256i channels[kSteps ? kSteps : 1];
        if constexpr (kSteps > 0) {
#pragma GCC unroll 8
            for (int s = 0; s < kSteps; ++s) channels[s] = load(query + 16 * s);
        }
        for (int k = 0; k < count; k += W) {
            __m256i quads[2];
#pragma GCC unroll 2
            for (int quad = 0; quad < 2; ++quad) {
                __m256i sums[4];
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    const int16_t* key = words_ + int64_t(k + 4 * quad + i) * dim_;
                    if constexpr (kSteps > 0) {
                        sums[i] = _mm256_madd_epi16(channels[0], load(key));
#pragma GCC unroll 8
                        for (int s = 1; s < kSteps; ++s) add_products(sums[i], channels[s], load(key + 16 * s));
                    } else {
                        sums[i] = _mm256_setzero_si256();
                        for (int d = 0; d < dim_; d += 16) add_products(sums[i], load(query + d), load(key + d));
                    }
                }
                quads[quad] = sum_quads(sums);
            }
            const __m256i total = _mm256_add_epi32(_mm256_permute2x128_si256(quads[0], quads[1], 0x20),
                                                   _mm256_permute2x128_si256(quads[0], quads[1], 0x31));
            Vec8::store(weights + k, Vec8::mul(_mm256_cvtepi32_ps(total), worth));
        }
    }

    int16_t* queries_;  // [group][dim]
    float* worths_;     // [group]
    int16_t* words_;    // [kRun][dim]
};

}  // namespace
