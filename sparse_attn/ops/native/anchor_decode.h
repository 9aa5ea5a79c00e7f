// Anchor scores of tiles of one query. The logits are those of decode, each key row loaded once for the whole group, in
// parts of the keys that threads share; then whole rows are normalised and pooled. What a prompt's tiles take (anchor.h)
// fills its columns with queries, and would compute most of them for nothing.
#pragma once

#include "anchor_kernels.h"
#include "decode.h"

namespace {

template <class Products>
int64_t anchor_logits_scratch(const foveate_anchor& call) {
    return decode_scratch<Products>(call.attention);
}

// ``logits[h * width + k]`` of the heads on one KV head and the keys first..last, in powers of two. ``first`` is a
// multiple of kDecodeBlock; up to kDecodeBlock words behind ``last`` are written.
template <class Products>
void anchor_logits(const foveate_anchor& anchor, int tile, int kv_head, int64_t first, int64_t last, float* logits,
                   int64_t width, void* scratch) {
    using S = typename Products::Simd;
    using F = typename S::F;
    using Row = typename Products::Row;
    constexpr int W = S::W;
    const foveate_attention& call = anchor.attention;
    const int group = heads_per_kind(call);
    Arena arena(scratch);
    DecodeState<Products> state(arena, call);
    state.products.start(static_cast<const typename Products::T*>(call.query) +
                             call.tile_start[tile] * call.query_token_stride +
                             int64_t(kv_head) * group * call.query_head_stride,
                         call.query_head_stride);
    KeyCursor<Row> cursor(call, call.tile_sequence[tile], kv_head, first, last, true);
    const bool cap = call.softcap != 0.0f;
    const F unit = S::set(cap ? kLog2E : call.scale * kLog2E);
    int current = 0;
    cursor.fill(state.blocks[0], kDecodeBlock);
    for (int64_t at = first; state.blocks[current].count > 0; at += kDecodeBlock) {
        KeyBlock<Row>& block = state.blocks[current];
        block.load_scales();
        KeyBlock<Row>& next = state.blocks[1 - current];
        cursor.fill(next, kDecodeBlock);
        Ahead<Row> ahead(next, call.head_dim);
        state.products.logits(block, ahead, state.weights);
        for (int h = 0; h < group; ++h)
            for (int k = 0; k < block.count; k += W) {
                F x = S::load(state.weights + h * kDecodeBlock + k);
                if constexpr (KeyBlock<Row>::kScaled) x = S::mul(x, S::load(block.key_scales + k));
                if (cap) x = capped<S>(x, call.scale, call.softcap);
                S::store(logits + h * width + at + k, S::mul(x, unit));
            }
        current = 1 - current;
    }
}

// The logits of one KV head's group, ``count`` keys each, become weights, whose shares are added to ``scores``.
template <class S>
void anchor_weigh(const foveate_anchor& anchor, int kv_head, int64_t count, float* logits, int64_t width, float* scores) {
    using F = typename S::F;
    constexpr int W = S::W;
    const foveate_attention& call = anchor.attention;
    const int group = heads_per_kind(call);
    for (int h = 0; h < group; ++h) {
        float* row = logits + h * width;
        F top = S::set(-kInfinity);
        for (int64_t k = 0; k < count; k += W) {
            const F x = S::first_lanes(S::load(row + k), int(smaller<int64_t>(W, count - k)));
            S::store(row + k, x);
            top = S::max(top, x);
        }
        const float reference = S::highest(top);
        F sums = S::zero();
        for (int64_t k = 0; k < count; k += W) {
            const F weight = S::template exp2<true>(S::sub(S::load(row + k), S::set(reference)));
            S::store(row + k, weight);
            sums = S::add(sums, weight);
        }
        float sum = S::sum(sums);
        if (call.sinks) sum += std::exp2(call.sinks[kv_head * group + h] * kLog2E - reference);
        const F share = S::set(1.0f / sum);
        for (int64_t k = 0; k < count; k += W)
            S::store(scores + k, S::fma(S::load(row + k), share, S::load(scores + k)));
    }
}

}  // namespace
