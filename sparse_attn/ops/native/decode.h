// Decode: one query per sequence, bound by the bytes of K and V.
//
// A work item is a part of one sequence's keys for one KV head, so that one long sequence keeps every core busy; parts
// are merged by log-sum-exp. Each key row is loaded once for the whole GQA group. Here vectors run along a row, as it
// comes from memory: dot products are summed up for W keys at a time by one tree of shuffles, weights are broadcast.
//
// Rows are prefetched half a block ahead: V while its K is multiplied, the next block's K while V is summed up.
#pragma once

#include <type_traits>

#include "prefill.h"

namespace {

constexpr int kDecodeBlock = 128;  // keys; 16 KiB of K and as much of V at 64 channels of bfloat16

// lane i = sum of the lanes of r[i].
FOVEATE_INLINE __m256 sum_each(const __m256 (&r)[8]) {
    __m256 quad[2];
    for (int i = 0; i < 2; ++i) {
        const __m256 a = _mm256_add_ps(_mm256_unpacklo_ps(r[4 * i], r[4 * i + 1]), _mm256_unpackhi_ps(r[4 * i], r[4 * i + 1]));
        const __m256 b =
            _mm256_add_ps(_mm256_unpacklo_ps(r[4 * i + 2], r[4 * i + 3]), _mm256_unpackhi_ps(r[4 * i + 2], r[4 * i + 3]));
        quad[i] = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
    }
    return _mm256_add_ps(_mm256_permute2f128_ps(quad[0], quad[1], 0x20), _mm256_permute2f128_ps(quad[0], quad[1], 0x31));
}

#if defined(__AVX512F__)
FOVEATE_INLINE __m512 sum_each(const __m512 (&r)[16]) {
    __m512 quad[4];
    for (int i = 0; i < 4; ++i) {
        const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(r[4 * i], r[4 * i + 1]), _mm512_unpackhi_ps(r[4 * i], r[4 * i + 1]));
        const __m512 b =
            _mm512_add_ps(_mm512_unpacklo_ps(r[4 * i + 2], r[4 * i + 3]), _mm512_unpackhi_ps(r[4 * i + 2], r[4 * i + 3]));
        quad[i] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    }
    __m512 half[2];
    for (int i = 0; i < 2; ++i)
        half[i] = _mm512_add_ps(_mm512_shuffle_f32x4(quad[2 * i], quad[2 * i + 1], 0x88),
                                _mm512_shuffle_f32x4(quad[2 * i], quad[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(half[0], half[1], 0x88), _mm512_shuffle_f32x4(half[0], half[1], 0xdd));
}
#endif

// How K rows and the query are multiplied: float32 after widening.
template <class S, class Storage>
struct FloatRows {
    using Simd = S;
    using T = Storage;
    using Q = float;
    static constexpr int kStep = S::W;  // channels per vector
    static FOVEATE_INLINE typename S::F mac(typename S::F acc, const T* key, const Q* query, int) {
        return S::fma(S::load(key), S::load(query), acc);
    }
};

#if defined(__AVX512BF16__)
struct DotRows {
    using Simd = Vec16;
    using T = bfloat16;
    using Q = bfloat16;
    static constexpr int kStep = 32;
    static FOVEATE_INLINE __m512 mac(__m512 acc, const T* key, const Q* query, int channels) {
        // The query is padded by zeros; of the key nothing behind its row may be read, it may be NaN.
        const __m512i k = channels >= 32 ? _mm512_loadu_si512(key)
                                         : _mm512_maskz_loadu_epi16((1u << (channels & 31)) - 1, key);
        return _mm512_dpbf16_ps(acc, (__m512bh)k, (__m512bh)_mm512_loadu_si512(query));
    }
};
#endif

template <class Rows>
struct DecodeState {
    using T = typename Rows::T;
    int stride;  // of a padded query row
    typename Rows::Q* queries;  // [group][stride]
    float* products;            // [4][W][W]
    float* weights;             // [group][kDecodeBlock]
    KeyBlock<T>* blocks;        // [2]

    DecodeState(void* memory, const foveate_attention& call, int64_t* bytes = nullptr) {
        constexpr int W = Rows::Simd::W;
        const int group = heads_per_kind(call);
        Arena arena(memory);
        stride = round_up(call.head_dim, Rows::kStep);
        queries = arena.take<typename Rows::Q>(int64_t(group) * stride);
        products = arena.take<float>(4 * W * W);
        weights = arena.take<float>(int64_t(group) * kDecodeBlock);
        blocks = arena.take<KeyBlock<T>>(2);
        if (bytes) *bytes = arena.used(memory);
    }
};

FOVEATE_INLINE void prefetch_row(const void* row, int bytes) {
    for (int at = 0; at < bytes; at += 64) _mm_prefetch(static_cast<const char*>(row) + at, _MM_HINT_T0);
}

// Dot products of H heads with W keys from ``at`` on, to ``logits[h][at..]``.
template <class Rows, int H>
void dot_products(const DecodeState<Rows>& state, const KeyBlock<typename Rows::T>& block, int at, int head, int dim,
                  float* logits) {
    using S = typename Rows::Simd;
    constexpr int W = S::W;
    const typename Rows::Q* query = state.queries + int64_t(head) * state.stride;
    for (int i = 0; i < W; ++i) {
        const typename Rows::T* key = block.keys[smaller(at + i, block.count - 1)];
        typename S::F acc[H];
        for (int h = 0; h < H; ++h) acc[h] = S::zero();
        for (int d = 0; d < dim; d += Rows::kStep)
            for (int h = 0; h < H; ++h) acc[h] = Rows::mac(acc[h], key + d, query + h * state.stride + d, dim - d);
        for (int h = 0; h < H; ++h) S::store(state.products + (h * W + i) * W, acc[h]);
    }
    for (int h = 0; h < H; ++h) {
        typename S::F rows[W];
        for (int i = 0; i < W; ++i) rows[i] = S::load(state.products + (h * W + i) * W);
        S::store(logits + h * kDecodeBlock + at, sum_each(rows));
    }
}

// outputs[h][d..] += weights[h][k] * values[k][d..] for H heads and V vectors.
template <class S, class T, int H, int V>
void weighted_sum(const KeyBlock<T>& block, const KeyBlock<T>* next, const float* weights, int dim, int d,
                  float* outputs, int64_t output_stride) {
    constexpr int W = S::W;
    typename S::F acc[H][V];
    for (int h = 0; h < H; ++h)
        for (int v = 0; v < V; ++v) acc[h][v] = S::load(outputs + h * output_stride + d + v * W);
    for (int k = 0; k < block.count; ++k) {
        if (next && k < next->count) prefetch_row(next->keys[k], dim * int(sizeof(T)));
        const T* value = block.values[k] + d;
        typename S::F row[V];
        for (int v = 0; v < V; ++v) row[v] = S::load(value + v * W);
        for (int h = 0; h < H; ++h) {
            const typename S::F weight = S::set(weights[h * kDecodeBlock + k]);
            for (int v = 0; v < V; ++v) acc[h][v] = S::fma(weight, row[v], acc[h][v]);
        }
    }
    for (int h = 0; h < H; ++h)
        for (int v = 0; v < V; ++v) S::store(outputs + h * output_stride + d + v * W, acc[h][v]);
}

template <class S, class T, int H>
void weighted_sums(const KeyBlock<T>& block, const KeyBlock<T>* next, const float* weights, int dim, float* outputs,
                   int64_t output_stride) {
    constexpr int W = S::W, kWide = W == 16 ? 4 : 2;  // 16 of 32 registers, or 8 of 16, are accumulators
    int d = 0;
    for (; d + kWide * W <= dim; d += kWide * W) {
        weighted_sum<S, T, H, kWide>(block, next, weights, dim, d, outputs, output_stride);
        next = nullptr;
    }
    for (; d < dim; d += W) {
        weighted_sum<S, T, H, 1>(block, next, weights, dim, d, outputs, output_stride);
        next = nullptr;
    }
}

// Calls f with the number of heads as a constant: four at a time share each load of K and V.
template <class Function>
FOVEATE_INLINE void by_heads(int group, Function&& f) {
    for (int head = 0; head < group; head += 4) {
        switch (smaller(4, group - head)) {
            case 1: f(head, std::integral_constant<int, 1>()); break;
            case 2: f(head, std::integral_constant<int, 2>()); break;
            case 3: f(head, std::integral_constant<int, 3>()); break;
            default: f(head, std::integral_constant<int, 4>()); break;
        }
    }
}

// Leaves per head ``{reference, sum, outputs[D]}``: weights are 2^(exponent - reference).
template <class Rows>
void decode_item(const foveate_attention& call, const DecodeItem& item, float* partial, void* scratch) {
    using S = typename Rows::Simd;
    using F = typename S::F;
    using T = typename Rows::T;
    constexpr int W = S::W;
    const int group = heads_per_kind(call), dim = call.head_dim, stride = dim + 2;
    DecodeState<Rows> state(scratch, call);
    for (int h = 0; h < group; ++h) {
        const T* source = static_cast<const T*>(call.query) + item.sequence * call.query_token_stride +
                          (item.kind * group + h) * call.query_head_stride;
        typename Rows::Q* target = state.queries + int64_t(h) * state.stride;
        for (int d = 0; d < state.stride; ++d) {
            if constexpr (sizeof(typename Rows::Q) == 2) target[d] = d < dim ? source[d] : 0;
            else target[d] = d < dim ? to_float(source[d]) : 0.0f;
        }
        float* own = partial + int64_t(h) * stride;
        own[0] = -kInfinity;
        for (int d = 1; d < stride; ++d) own[d] = 0.0f;
    }

    const int64_t position = int64_t(call.context_lens[item.sequence]) - 1;
    int64_t begin = larger<int64_t>(0, position - call.farthest + 1), end = position - call.nearest + 1;
    const int kinds = call.num_heads / group;
    if (!call.indices) {
        begin = larger(begin, item.first);
        end = smaller(end, item.last);
    }
    KeyCursor<T> cursor(call, item.sequence, item.kind / (kinds / call.num_kv_heads), begin, end, true);
    if (call.indices) {
        const int64_t row = int64_t(item.sequence) * call.selected_heads + item.kind;
        cursor.select(call.indices + row * call.selected_width, int(item.first), int(item.last), call.granularity);
    }
    const bool cap = call.softcap != 0.0f;
    const F unit = S::set(cap ? kLog2E : call.scale * kLog2E);
    int current = 0;
    if (begin < end) cursor.fill(state.blocks[0], kDecodeBlock);
    else state.blocks[0].count = 0;
    while (state.blocks[current].count > 0) {
        const KeyBlock<T>& block = state.blocks[current];
        KeyBlock<T>& next = state.blocks[1 - current];
        cursor.fill(next, kDecodeBlock);
        for (int at = 0; at < block.count; at += W) {
            for (int i = at; i < smaller(at + W, block.count); ++i) prefetch_row(block.values[i], dim * int(sizeof(T)));
            by_heads(group, [&](int head, auto heads) {
                dot_products<Rows, decltype(heads)::value>(state, block, at, head, dim,
                                                           state.weights + head * kDecodeBlock);
            });
        }
        for (int h = 0; h < group; ++h) {
            float* weights = state.weights + h * kDecodeBlock;
            float* own = partial + int64_t(h) * stride;
            F top = S::set(-kInfinity);
            for (int at = 0; at < block.count; at += W) {
                F x = S::load(weights + at);
                if (cap) x = capped<S>(x, call.scale, call.softcap);
                x = S::first_lanes(S::mul(x, unit), block.count - at);
                S::store(weights + at, x);
                top = S::max(top, x);
            }
            const float highest = S::highest(top);
            if (highest > own[0] + kSlack) {
                const float ratio = std::exp2(own[0] - highest);
                const F shrink = S::set(ratio);
                own[0] = highest;
                own[1] *= ratio;
                for (int d = 0; d < dim; d += W) S::store(own + 2 + d, S::mul(S::load(own + 2 + d), shrink));
            }
            const F reference = S::set(own[0]);
            F sum = S::zero();
            for (int at = 0; at < block.count; at += W) {
                const F weight = S::template exp2<true>(S::sub(S::load(weights + at), reference));
                S::store(weights + at, weight);
                sum = S::add(sum, weight);
            }
            own[1] += S::sum(sum);
        }
        const KeyBlock<T>* ahead = &next;
        by_heads(group, [&](int head, auto heads) {
            weighted_sums<S, T, decltype(heads)::value>(block, ahead, state.weights + head * kDecodeBlock, dim,
                                                        partial + int64_t(head) * stride + 2, stride);
            ahead = nullptr;
        });
        current = 1 - current;
    }
}

// Sums up the parts of one query's keys, and writes out and log-sum-exp.
template <class Rows>
void decode_merge(const foveate_attention& call, int sequence, int kind, const float* partials, int parts) {
    using S = typename Rows::Simd;
    using T = typename Rows::T;
    constexpr int W = S::W;
    const int group = heads_per_kind(call), dim = call.head_dim;
    const int64_t stride = dim + 2;
    for (int h = 0; h < group; ++h) {
        const int head = kind * group + h;
        const int64_t place = int64_t(sequence) * call.num_heads + head;
        const float* own = partials + h * stride;
        float reference = -kInfinity, sum = 0.0f;
        for (int p = 0; p < parts; ++p) reference = larger(reference, own[p * group * stride]);
        for (int p = 0; p < parts; ++p) {
            const float* part = own + p * group * stride;
            if (part[1] > 0.0f) sum += part[1] * std::exp2(part[0] - reference);
        }
        const float lse = sum > 0.0f ? (reference + std::log2(sum)) / kLog2E : -kInfinity;
        call.lse[place] = lse;
        float share = sum > 0.0f ? 1.0f / sum : 0.0f;
        if (call.sinks && sum > 0.0f) share /= 1.0f + std::exp(call.sinks[head] - lse);
        T* out = static_cast<T*>(call.out) + place * dim;
        for (int d = 0; d < dim; d += W) {
            typename S::F total = S::zero();
            for (int p = 0; p < parts; ++p) {
                const float* part = own + p * group * stride;
                if (part[1] > 0.0f)
                    total = S::fma(S::load(part + 2 + d), S::set(std::exp2(part[0] - reference) * share), total);
            }
            S::store(out + d, total);
        }
    }
}

template <class Rows>
int64_t decode_scratch(const foveate_attention& call) {
    int64_t bytes = 0;
    DecodeState<Rows>(nullptr, call, &bytes);
    return bytes;
}

inline void nothing() {}

// The table of one instruction set and element type.
template <class Engine, class Rows>
constexpr IsaKernels kernels_of(void (*begin)() = nothing, void (*end)() = nothing) {
    return {prefill_rows<Engine>,  prefill_scratch<Engine>, prefill_item<Engine>, decode_scratch<Rows>,
            decode_item<Rows>,     decode_merge<Rows>,      begin,                end};
}

}  // namespace
