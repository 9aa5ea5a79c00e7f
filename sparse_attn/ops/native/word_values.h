// Attention of prompts over int8 pages on AVX2 by products of words: those of weights and values too, which go 1.5 times as
// fast as in float32.
//
// A weight, its value's scale multiplied in, is rounded to 16 bits of the largest weight that its column has in the block
// times the largest scale that the pass reads there: so a sink does not take the bits of keys in other blocks. Where scales
// differ by more than kSpread, it is 16 bits of the largest product that the column has: so a huge value takes no bits
// where it is not seen, or hardly weighs. A product is off by 2^-16 of that at most, where rounding values cost each 2^-8
// of its own. Sums of 64 products of 127 and 32,767 fit 32 bits, and are added up in float32 per block.
#pragma once

#include "word_engine.h"

namespace {

template <class Result>
struct WordValueEngine : WordEngine<Result> {
    using Base = WordEngine<Result>;
    using Base::dim_, Base::kBlock, Base::kVectors, Base::W;
    using T = Result;
    using Row = int8_t;
    using Simd = typename Base::Simd;
    using F = typename Simd::F;
    static constexpr bool kWords = true;
    static_assert(int64_t(kBlock) * 127 * 32767 < INT32_MAX);

    // The values of two keys side by side follow the words of the keys: together half of what floats take.
    WordValueEngine(void* memory, int dim)
        : Base(memory, dim), pairs_(reinterpret_cast<int32_t*>(Base::wide_) + int64_t(kBlock) * dim) {}

    void load(const KeyBlock<Row>& block) {
        Base::load_keys(block);
        for (int i = 0; i < block.count; i += 2) {
            const Row* even = block.values[i];
            const Row* odd = i + 1 < block.count ? block.values[i + 1] : reinterpret_cast<const Row*>(kZeroRow);
            int32_t* pair = pairs_ + int64_t(i / 2) * dim_;
            for (int d = 0; d < dim_; d += 16) {
                const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(even + d));
                const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(odd + d));
                store(pair + d, _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b)));
                store(pair + d + 8, _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(a, b)));
            }
        }
        last_ = 0;  // of no pass
    }

    // Of the keys [first, last), which a pass reads; most passes read all of a block.
    void choose_levels(const KeyBlock<Row>& block, int first, int last) {
        if (first == first_ && last == last_) return;
        float top = kLeastScale, least = __FLT_MAX__;
        sound_ = true;
        for (int k = first; k < last; ++k) {
            const float scale = block.value_scales[k];
            top = scale > top ? scale : top;
            least = scale > 0.0f && scale < least ? scale : least;
            sound_ &= scale <= __FLT_MAX__;
        }
        levels_ = std::log2(32767.0f / top);
        even_ = top <= kSpread * least;
        if (!even_)
            for (int k = first; k < last; ++k) exponents_[k] = std::log2(block.value_scales[k]);
        first_ = first, last_ = last;
    }

    // log2 of the levels that a weight of 1 is, over the value's scale: for a column whose logits behind ``most``, times
    // ``factor``, are exponents of 2.
    F levels(const float* logits, F most, F factor) const {
        if (even_) return Simd::set(levels_);
        F top = Simd::set(std::log2(kLeastScale));
        for (int k = first_; k < last_; ++k)
            top = Simd::max(top, Simd::fma(Simd::sub(Simd::load(logits + k * W), most), factor, Simd::set(exponents_[k])));
        return Simd::sub(Simd::set(std::log2(32767.0f)), top);
    }

    // Whether all values are numbers.
    bool sound() const { return sound_; }

    // Two vectors of levels, ``a`` in the low halves.
    static FOVEATE_INLINE void store_pair(float* p, __m256 a, __m256 b) {
        const __m256i high = _mm256_slli_epi32(_mm256_cvtps_epi32(b), 16);
        store(p, _mm256_blend_epi16(_mm256_cvtps_epi32(a), high, 0xaa));
    }

    // O[v][channel][W] += weights x values, of ``kVectors`` vectors.
    void accumulate(const float* weights, const float* worths, float* outputs, int first, int last) const {
        int d = 0;
        for (; d + kChannels <= dim_; d += kChannels) add<kChannels>(weights, worths, outputs, d, first, last);
        for (; d < dim_; ++d) add<1>(weights, worths, outputs, d, first, last);
    }

private:
    static constexpr int kChannels = 3;  // as many sums as for logits
    static constexpr float kSpread = 64.0f;
    static constexpr float kLeastScale = 0x1p-100f;  // less would make weights overflow

    static FOVEATE_INLINE void store(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }

    template <int R>
    __attribute__((noinline)) void add(const float* weights, const float* worths, float* outputs, int channel, int first,
                                       int last) const {
        const int64_t vector = int64_t(dim_) * W;
        const int32_t* a = pairs_ + channel;
        __m256i acc[R][kVectors];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int c = 0; c < kVectors; ++c) acc[r][c] = _mm256_setzero_si256();
#pragma GCC unroll 2
        for (int k = first; k < last; k += 2) {
            __m256i column[kVectors];
#pragma GCC unroll 4
            for (int c = 0; c < kVectors; ++c)
                column[c] = _mm256_castps_si256(Vec8::load(weights + (int64_t(c) * kBlock + k) * W));
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const __m256i pair = _mm256_set1_epi32(a[int64_t(k / 2) * dim_ + r]);
#pragma GCC unroll 4
                for (int c = 0; c < kVectors; ++c) add_products(acc[r][c], pair, column[c]);
            }
        }
#pragma GCC unroll 4
        for (int c = 0; c < kVectors; ++c) {
            const __m256 worth = Vec8::load(worths + c * W);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                float* out = outputs + c * vector + int64_t(channel + r) * W;
                Vec8::store(out, Vec8::fma(_mm256_cvtepi32_ps(acc[r][c]), worth, Vec8::load(out)));
            }
        }
    }

    int32_t* pairs_;  // [kBlock / 2][dim]
    float levels_ = 0.0f;        // log2, of all columns
    float exponents_[kBlock];    // log2 of scales, where they are not even
    bool even_ = true, sound_ = true;
    int first_ = 0, last_ = 0;
};

template <class Engine>
FOVEATE_INLINE void softmax_words(const foveate_attention& call, const Engine& engine, PrefillState<Engine>& state, int v,
                                  int c, const KeyBlock<typename Engine::Row>& block, int first, int last, bool masked) {
    using Simd = typename Engine::Simd;
    using F = typename Simd::F;
    constexpr int W = Simd::W;
    float* logits = state.logits + c * Engine::kBlock * W;
    F top;
    const F reference =
        raise_reference<Engine>(call, state, v + c, logits, block, first, last, masked, kSlack, call.head_dim, &top);
    const F factor = Simd::set(exponent_unit(call));
    // The difference first: rounded with the levels, an exponent of a large logit would be off by more than one of them.
    const F most = Simd::finite(top), levels = engine.levels(logits, most, factor);
    auto weight = [&](int k) {
        return Simd::template exp2<true>(Simd::fma(Simd::sub(Simd::load(logits + k * W), most), factor, levels));
    };
    const auto scale = [&](int k) { return Simd::set(block.value_scales[k]); };
    F sums[2] = {Simd::zero(), Simd::zero()};
    int k = first;
    for (; k + 2 <= last; k += 2) {
        const F a = weight(k), b = weight(k + 1);
        sums[0] = Simd::add(sums[0], a);
        sums[1] = Simd::add(sums[1], b);
        Engine::store_pair(logits + k * W, Simd::mul(a, scale(k)), Simd::mul(b, scale(k + 1)));
    }
    if (k < last) {
        const F a = weight(k);
        sums[0] = Simd::add(sums[0], a);
        Engine::store_pair(logits + k * W, Simd::mul(a, scale(k)), Simd::zero());
    }
    const F sum = Simd::add(sums[0], sums[1]);
    // A column that sees none of these keys has a top of -inf, and 0 of them.
    const F moved = Simd::template exp2<true>(Simd::mul(Simd::sub(top, Simd::finite(reference)), factor));
    const F worth = Simd::mul(moved, Simd::template exp2<true>(Simd::sub(Simd::zero(), levels)));
    Simd::store(state.sums + (v + c) * W, Simd::fma(sum, worth, Simd::load(state.sums + (v + c) * W)));
    // Levels of what is not finite are numbers all the same: their worth is not.
    const F unsound = engine.sound() ? Simd::sub(sum, sum) : Simd::set(__builtin_nanf(""));
    Simd::store(state.worths + c * W, Simd::add(worth, unsound));
}

}  // namespace
