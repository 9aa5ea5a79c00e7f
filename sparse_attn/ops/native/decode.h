// Decode: one query per sequence, bound by the bytes of K and V.
//
// A work item is a part of one query's keys for one KV head, so that one long sequence keeps every core busy; parts
// are merged by log-sum-exp. Each key row is loaded once for the whole GQA group, and rows are prefetched one block
// ahead, spread evenly over the products.
//
// A Products class supplies the two products; see decode_vectors.h, word_products.h, decode_tiles.h and decode_bytes.h.
#pragma once

#include "decode_vectors.h"
#include "gathered.h"

namespace {

template <class Products>
struct DecodeState {
    using Row = typename Products::Row;
    Products products;
    float* weights;         // [group][kDecodeBlock]
    KeyBlock<Row>* blocks;  // [2]

    DecodeState(Arena& arena, const foveate_attention& call)
        : products(arena, call),
          weights(arena.take<float>(int64_t(heads_per_kind(call)) * kDecodeBlock)),
          blocks(arena.take<KeyBlock<Row>>(2)) {}
};

// One head's products of a block become exponents of 2, -inf behind the last key; returns the largest.
template <class S, class Row>
FOVEATE_INLINE float exponents(const foveate_attention& call, const KeyBlock<Row>& block, float* products) {
    using F = typename S::F;
    constexpr int W = S::W;
    const bool cap = call.softcap != 0.0f;
    const F unit = S::set(cap ? kLog2E : call.scale * kLog2E);
    F top = S::set(-kInfinity);
    for (int at = 0; at < block.count; at += W) {
        F x = S::load(products + at);
        if constexpr (KeyBlock<Row>::kScaled) x = S::mul(x, S::load(block.key_scales + at));
        if (cap) x = capped<S>(x, call.scale, call.softcap);
        x = S::first_lanes(S::mul(x, unit), block.count - at);
        S::store(products + at, x);
        top = S::max(top, x);
    }
    return S::highest(top);
}

// One head's logits become weights 2^(exponent - own[0]), each times its value's scale, and own[1] the sum of the
// weights so far.
template <class Products>
FOVEATE_INLINE void decode_softmax(const foveate_attention& call, Products& products, int head,
                                   const KeyBlock<typename Products::Row>& block, float* weights, float* own) {
    using S = typename Products::Simd;
    using F = typename S::F;
    constexpr int W = S::W;
    constexpr bool kScaled = KeyBlock<typename Products::Row>::kScaled;
    const int count = block.count;
    const float highest = exponents<S>(call, block, weights);
    if (highest > own[0] + kSlack) {
        const float factor = std::exp2(own[0] - highest);
        own[0] = highest;
        own[1] *= factor;
        products.shrink(head, factor);
    }
    const F reference = S::set(own[0]);
    F sum = S::zero();
    for (int at = 0; at < count; at += W) {
        const F weight = S::template exp2<true>(S::sub(S::load(weights + at), reference));
        sum = S::add(sum, weight);
        if constexpr (kScaled) S::store(weights + at, S::mul(weight, S::load(block.value_scales + at)));
        else S::store(weights + at, weight);
    }
    own[1] += S::sum(sum);
}

// Leaves per head ``{reference, sum, outputs[D]}``: weights are 2^(exponent - reference).
template <class Products>
void decode_item(const foveate_attention& call, const DecodeItem& item, float* partial, void* scratch) {
    using T = typename Products::T;
    using Row = typename Products::Row;
    const int group = heads_per_kind(call), dim = call.head_dim, stride = dim + 2;
    Arena arena(scratch);
    DecodeState<Products> state(arena, call);
    state.products.start(static_cast<const T*>(call.query) + item.query * call.query_token_stride +
                             item.kind * group * call.query_head_stride,
                         call.query_head_stride);
    for (int h = 0; h < group; ++h) {
        partial[h * stride] = -kInfinity;
        partial[h * stride + 1] = 0.0f;
    }

    int64_t begin = larger<int64_t>(0, item.position - call.farthest + 1), end = item.position - call.nearest + 1;
    const int kinds = call.num_heads / group;
    if (!call.indices) {
        begin = larger(begin, item.first);
        end = smaller(end, item.last);
    }
    KeyCursor<Row> cursor(call, item.sequence, item.kind / (kinds / call.num_kv_heads), begin, end, true);
    if (call.indices) {
        const int64_t row = int64_t(item.row) * call.selected_heads + item.kind;
        cursor.select(call.indices + row * call.selected_width, int(item.first), int(item.last), call.granularity);
    }
    int current = 0;
    state.blocks[0].count = 0;
    if (begin < end) cursor.fill(state.blocks[0], kDecodeBlock);
    Ahead<Row>(state.blocks[0], dim).advance(2 * kDecodeBlock);
    while (state.blocks[current].count > 0) {
        KeyBlock<Row>& block = state.blocks[current];
        block.load_scales();
        KeyBlock<Row>& next = state.blocks[1 - current];
        cursor.fill(next, kDecodeBlock);
        Ahead<Row> ahead(next, dim);
        state.products.logits(block, ahead, state.weights);
        for (int h = 0; h < group; ++h)
            decode_softmax(call, state.products, h, block, state.weights + h * kDecodeBlock, partial + h * stride);
        state.products.accumulate(block, ahead, state.weights);
        current = 1 - current;
    }
    const float* outputs = state.products.finish();
    for (int h = 0; h < group; ++h)
        __builtin_memcpy(partial + h * stride + 2, outputs + int64_t(h) * dim, size_t(dim) * 4);
}

// Sums up the parts of one query's keys, and writes out and log-sum-exp.
template <class Products>
void decode_merge(const foveate_attention& call, int query, int kind, const float* partials, int parts) {
    using S = typename Products::Simd;
    using T = typename Products::T;
    constexpr int W = S::W;
    const int group = heads_per_kind(call), dim = call.head_dim;
    const int64_t stride = dim + 2;
    for (int h = 0; h < group; ++h) {
        const int head = kind * group + h;
        const int64_t place = int64_t(query) * call.num_heads + head;
        const float* own = partials + h * stride;
        // A sum is 0 where no key was seen, and NaN where a logit was: NaN is passed on.
        float reference = -kInfinity, sum = 0.0f;
        for (int p = 0; p < parts; ++p) reference = larger(reference, own[p * group * stride]);
        for (int p = 0; p < parts; ++p) {
            const float* part = own + p * group * stride;
            if (part[1] != 0.0f) sum += part[1] * std::exp2(part[0] - reference);
        }
        const float lse = sum != 0.0f ? (reference + std::log2(sum)) / kLog2E : -kInfinity;
        call.lse[place] = lse;
        float share = sum != 0.0f ? 1.0f / sum : 0.0f;
        if (call.sinks && sum != 0.0f) share /= 1.0f + std::exp(call.sinks[head] - lse);
        T* out = static_cast<T*>(call.out) + place * dim;
        for (int d = 0; d < dim; d += W) {
            typename S::F total = S::zero();
            for (int p = 0; p < parts; ++p) {
                const float* part = own + p * group * stride;
                if (part[1] != 0.0f)
                    total = S::fma(S::load(part + 2 + d), S::set(std::exp2(part[0] - reference) * share), total);
            }
            S::store(out + d, total);
        }
    }
}

template <class Products>
int64_t decode_scratch(const foveate_attention& call) {
    Arena arena(nullptr);
    DecodeState<Products> state(arena, call);
    return arena.used(nullptr);
}

inline void nothing() {}

// The table of one instruction set and element type; ``Gathered`` is the engine of queries that choose by themselves.
template <class Engine, class Products, class Gathered = Engine>
constexpr IsaKernels kernels_of(void (*begin)() = nothing, void (*end)() = nothing) {
    return {
        prefill_rows<Engine>,     prefill_scratch<Engine>,  prefill_item<Engine>,    gathered_rows<Gathered>,
        gathered_scratch<Gathered>, gathered_item<Gathered>, decode_scratch<Products>, decode_item<Products>,
        decode_merge<Products>,   begin,                    end,
    };
}

}  // namespace
