// Both products of decode by vector instructions, four keys and several heads of the group at a time.
//
// Vectors run along a row, as it comes from memory. Dot products are summed up for a vector of keys by one tree of
// shuffles; weights are broadcast.
#pragma once

#include <type_traits>

#include "prefill.h"

namespace {

constexpr int kDecodeWords = kDecodeBlock / 64;  // of bits, one per key

// Prefetches rows to L2, evenly over the work that is done meanwhile: a burst would wait for line buffers while nothing
// is computed. Into L1, or not at all, decode of one group of three heads ran 10 to 25 % slower.
template <class Row>
class Ahead {
public:
    // The keys of a block, then its values, while the products of another are computed.
    Ahead(const KeyBlock<Row>& block, int dim) : block_(block), end_(2 * block.count), bytes_(dim * int(sizeof(Row))) {}
    // ``values``, then the keys of a block. ``work``: rows that the products and others will advance by until then.
    Ahead(const KeyBlock<Row>& block, int dim, const Row* const* values, int num_values, int work)
        : block_(block),
          before_(values + num_values),
          end_(block.count),
          bytes_(dim * int(sizeof(Row))),
          pace_(larger(1, kPace * (num_values + block.count) / work)),
          due_(-num_values * kPace),
          row_(-num_values) {}
    // A share ``1 / parts`` of so many rows is done.
    FOVEATE_INLINE void advance(int rows, int parts = 1) {
        due_ += rows * pace_ / parts;
        const int end = smaller(due_ / kPace, end_);
        if (row_ >= end) return;
        block_.prefetch_scales(larger(row_, 0), smaller(end, block_.count));
        for (; row_ < end; ++row_) {
            const Row* row = row_ < 0                ? before_[row_]
                             : row_ < block_.count ? block_.keys[row_]
                                                   : block_.values[row_ - block_.count];
            for (int at = 0; at < bytes_; at += 64) _mm_prefetch(reinterpret_cast<const char*>(row) + at, _MM_HINT_T1);
        }
    }

private:
    static constexpr int kPace = 1024;
    const KeyBlock<Row>& block_;
    const Row* const* before_ = nullptr;  // end of the rows that come first
    const int end_, bytes_;
    const int pace_ = kPace;  // rows to prefetch per row done, times kPace
    int due_ = 0;             // rows, times kPace
    int row_ = 0;
};

// In each 128-bit lane, the four sums of that lane of r[0..3].
FOVEATE_INLINE __m256 sum_quads(const __m256 (&r)[4]) {
    const __m256 a = _mm256_add_ps(_mm256_unpacklo_ps(r[0], r[1]), _mm256_unpackhi_ps(r[0], r[1]));
    const __m256 b = _mm256_add_ps(_mm256_unpacklo_ps(r[2], r[3]), _mm256_unpackhi_ps(r[2], r[3]));
    return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
}
// Lane 4i + j = the j-th sums of quads[i], over its 128-bit lanes.
FOVEATE_INLINE __m256 sum_lanes(const __m256 (&quads)[2]) {
    return _mm256_add_ps(_mm256_permute2f128_ps(quads[0], quads[1], 0x20),
                         _mm256_permute2f128_ps(quads[0], quads[1], 0x31));
}

#if defined(__AVX512F__)
FOVEATE_INLINE __m512 sum_quads(const __m512 (&r)[4]) {
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(r[0], r[1]), _mm512_unpackhi_ps(r[0], r[1]));
    const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(r[2], r[3]), _mm512_unpackhi_ps(r[2], r[3]));
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
}
FOVEATE_INLINE __m512 sum_lanes(const __m512 (&quads)[4]) {
    __m512 half[2];
    for (int i = 0; i < 2; ++i)
        half[i] = _mm512_add_ps(_mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0x88),
                                _mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(half[0], half[1], 0x88), _mm512_shuffle_f32x4(half[0], half[1], 0xdd));
}
#endif

// How K rows and the query are multiplied: float32 after widening.
template <class S, class Result, class Storage = Result>
struct FloatRows {
    using Simd = S;
    using T = Result;  // of the query, too
    using Row = Storage;
    using Q = float;
    static constexpr int kStep = S::W;  // channels per vector
    static FOVEATE_INLINE typename S::F load(const Row* key, int) { return S::load(key); }
    static FOVEATE_INLINE typename S::F query(const Q* query) { return S::load(query); }
    static FOVEATE_INLINE typename S::F mac(typename S::F acc, typename S::F key, typename S::F query) {
        return S::fma(key, query, acc);
    }
};

#if defined(__AVX512BF16__)
struct DotRows {
    using Simd = Vec16;
    using T = bfloat16;
    using Row = bfloat16;
    using Q = bfloat16;
    static constexpr int kStep = 32;
    static FOVEATE_INLINE __m512 load(const Row* key, int channels) {
        // The query is padded by zeros; of the key nothing behind its row may be read, it may be NaN.
        return _mm512_castsi512_ps(channels >= 32 ? _mm512_loadu_si512(key)
                                                  : _mm512_maskz_loadu_epi16((1u << (channels & 31)) - 1, key));
    }
    static FOVEATE_INLINE __m512 query(const Q* query) { return _mm512_castsi512_ps(_mm512_loadu_si512(query)); }
    static FOVEATE_INLINE __m512 mac(__m512 acc, __m512 key, __m512 query) {
        return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_castps_si512(key), (__m512bh)_mm512_castps_si512(query));
    }
};
#endif

// Calls f with a number of heads, ``most`` at a time, as a constant; the last two about equal, as one alone would wait
// for its own sums.
template <int most, class Function>
FOVEATE_INLINE void by_heads(int group, Function&& f) {
    for (int head = 0, heads; head < group; head += heads) {
        const int rest = group - head;
        heads = rest <= most ? rest : rest < 2 * most ? (rest + 1) / 2 : most;
        if (heads == 1) f(head, std::integral_constant<int, 1>());
        else if (heads == 2) f(head, std::integral_constant<int, 2>());
        else if (most == 3 || heads == 3) f(head, std::integral_constant<int, 3>());
        else f(head, std::integral_constant<int, most>());
    }
}

template <class Rows>
class VectorProducts {
public:
    using Simd = typename Rows::Simd;
    using T = typename Rows::T;
    using Row = typename Rows::Row;

    VectorProducts(Arena& arena, const foveate_attention& call) : dim_(call.head_dim), group_(heads_per_kind(call)) {
        stride_ = round_up(dim_, Rows::kStep);
        queries_ = arena.take<Q>(int64_t(group_) * stride_);
        outputs_ = arena.take<float>(int64_t(group_) * dim_);
    }

    void start(const T* query, int64_t head_stride) {
        for (int h = 0; h < group_; ++h) {
            const T* source = query + h * head_stride;
            Q* target = queries_ + int64_t(h) * stride_;
            for (int d = 0; d < stride_; ++d) {
                if constexpr (sizeof(Q) == 2) target[d] = d < dim_ ? source[d] : Q(0);
                else target[d] = d < dim_ ? to_float(source[d]) : 0.0f;
            }
        }
        clear();
    }

    // weights[h][k] = query h times key k, without its scale.
    void logits(const KeyBlock<Row>& block, Ahead<Row>& ahead, float* weights) {
        const int passes = (group_ + kHeads - 1) / kHeads;
        for (int at = 0; at < block.count; at += W) {
            const Row* const* keys = block.keys + at;
            const Row* last[W];
            if (at + W > block.count) {
                for (int i = 0; i < W; ++i) last[i] = block.keys[smaller(at + i, block.count - 1)];
                keys = last;
            }
            by_heads<kHeads>(group_, [&](int head, auto heads) {
                ahead.advance(W, passes);
                dot_products<decltype(heads)::value>(keys, head, weights + at);
            });
        }
    }

    // The accumulators times a factor.
    void shrink(int head, float factor) {
        float* output = outputs_ + int64_t(head) * dim_;
        for (int d = 0; d < dim_; d += W) Simd::store(output + d, Simd::mul(Simd::load(output + d), Simd::set(factor)));
    }

    // outputs[h] += sum of weights[h][k] times value k.
    void accumulate(const KeyBlock<Row>& block, Ahead<Row>& ahead, const float* weights) {
        by_heads<4>(group_, [&](int head, auto heads) {
            // 8 of 16 registers are sums, 16 of 32; but no more than 64 channels, since many models have no more.
            constexpr int H = decltype(heads)::value, kSums = (W == 16 ? 16 : 8) / (H == 3 ? 4 : H);
            constexpr int kWide = kSums * W > 64 ? 64 / W : kSums;
            const int passes = (group_ + 3) / 4 * (dim_ / (kWide * W) + dim_ % (kWide * W) / W);
            int d = 0;
            for (; d + kWide * W <= dim_; d += kWide * W)
                weighted_sum<H, kWide>(block, ahead, passes, weights, head, d);
            for (; d < dim_; d += W) weighted_sum<H, 1>(block, ahead, passes, weights, head, d);
        });
    }

    // outputs[head] += sum of weights[k] times value k, over the keys of a block marked in ``bits``.
    void accumulate_marked(const KeyBlock<Row>& block, const uint64_t* bits, int head, const float* weights) {
        constexpr int kWide = 64 / W;
        int d = 0;
        for (; d + kWide * W <= dim_; d += kWide * W) marked_sum<kWide>(block, bits, head, weights, d);
        for (; d < dim_; d += W) marked_sum<1>(block, bits, head, weights, d);
    }

    const float* finish() { return outputs_; }

protected:
    void clear() {
        for (int i = 0; i < group_ * dim_; ++i) outputs_[i] = 0.0f;
    }

    const int dim_, group_;

private:
    using F = typename Simd::F;
    using Q = typename Rows::Q;
    static constexpr int W = Simd::W;
    static constexpr int kHeads = W == 16 ? 4 : 3;  // with four keys, 16 of 32 registers, 12 of 16, are sums

    // Of H heads and a vector of keys; with one head all of them at once, as four sums would wait for each other. Not
    // inlined: in a larger function GCC spills the sums, and took 1.6 times as long.
    template <int H>
    __attribute__((noinline)) void dot_products(const Row* const* keys, int head, float* weights) {
        constexpr int kAtOnce = H == 1 ? W / 4 : 1;
        const Q* query = queries_ + int64_t(head) * stride_;
        F quads[H][W / 4];
#pragma GCC unroll 4
        for (int quad = 0; quad < W / 4; quad += kAtOnce) {
            F acc[H][kAtOnce][4];
            for (int h = 0; h < H; ++h)
                for (int i = 0; i < kAtOnce; ++i)
                    for (int j = 0; j < 4; ++j) acc[h][i][j] = Simd::zero();
            for (int d = 0; d < dim_; d += Rows::kStep) {
                F channels[H];
                for (int h = 0; h < H; ++h) channels[h] = Rows::query(query + h * stride_ + d);
#pragma GCC unroll 16
                for (int i = 0; i < 4 * kAtOnce; ++i) {
                    F row = Rows::load(keys[quad * 4 + i] + d, dim_ - d);
                    FOVEATE_HOLD(row);  // or GCC loads it anew for each head, and loads are the limit
                    for (int h = 0; h < H; ++h)
                        acc[h][i / 4][i % 4] = Rows::mac(acc[h][i / 4][i % 4], row, channels[h]);
                }
            }
            for (int h = 0; h < H; ++h)
                for (int i = 0; i < kAtOnce; ++i) quads[h][quad + i] = sum_quads(acc[h][i]);
        }
        for (int h = 0; h < H; ++h) Simd::store(weights + (head + h) * kDecodeBlock, sum_lanes(quads[h]));
    }

    // Of H heads and V vectors of channels, one of several passes over the block.
    template <int H, int V>
    void weighted_sum(const KeyBlock<Row>& block, Ahead<Row>& ahead, int passes, const float* weights, int head, int d) {
        float* outputs = outputs_ + int64_t(head) * dim_ + d;
        weights += head * kDecodeBlock;
        F acc[H][V];
        for (int h = 0; h < H; ++h)
            for (int v = 0; v < V; ++v) acc[h][v] = Simd::load(outputs + h * dim_ + v * W);
        for (int k = 0; k < block.count; ++k) {
            if (k % 4 == 0) ahead.advance(4, passes);
            const Row* value = block.values[k] + d;
            F row[V];
            for (int v = 0; v < V; ++v) row[v] = Simd::load(value + v * W);
            for (int h = 0; h < H; ++h) {
                const F weight = Simd::set(weights[h * kDecodeBlock + k]);
                for (int v = 0; v < V; ++v) acc[h][v] = Simd::fma(weight, row[v], acc[h][v]);
            }
        }
        for (int h = 0; h < H; ++h)
            for (int v = 0; v < V; ++v) Simd::store(outputs + h * dim_ + v * W, acc[h][v]);
    }

    // Of one head and V vectors of channels.
    template <int V>
    void marked_sum(const KeyBlock<Row>& block, const uint64_t* bits, int head, const float* weights, int d) {
        float* output = outputs_ + int64_t(head) * dim_ + d;
        F acc[V];
        for (int v = 0; v < V; ++v) acc[v] = Simd::load(output + v * W);
        for (int word = 0; word * 64 < block.count; ++word)
            for (uint64_t rest = bits[word]; rest; rest &= rest - 1) {
                const int k = word * 64 + __builtin_ctzll(rest);
                float scale = weights[k];
                if constexpr (KeyBlock<Row>::kScaled) scale *= block.value_scales[k];
                const F weight = Simd::set(scale);
                const Row* value = block.values[k] + d;
                for (int v = 0; v < V; ++v) acc[v] = Simd::fma(weight, Simd::load(value + v * W), acc[v]);
            }
        for (int v = 0; v < V; ++v) Simd::store(output + v * W, acc[v]);
    }

    int stride_;  // of a padded query row
    Q* queries_;
    float* outputs_;
};

}  // namespace
