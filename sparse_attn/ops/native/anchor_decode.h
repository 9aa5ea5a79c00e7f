// Anchor scores of tiles of one query. The logits are those of decode, each key row loaded once for the whole group, in
// parts of the keys that threads share; then whole rows are normalised and pooled. What a prompt's tiles take (anchor.h)
// fills its columns with queries, and would compute most of them for nothing.
#pragma once

#include "anchor_kernels.h"
#include "decode.h"

namespace {

template <class Products>
int64_t anchor_weights_scratch(const foveate_anchor& call) {
    return decode_scratch<Products>(call.attention);
}

// Weights of the heads on one KV head and the keys first..last: ``weights[h * width + k]`` are powers of 2 relative to
// the largest exponent of their block, which with their sum is ``blocks[h * width / kDecodeBlock + block]``. ``first`` is
// a multiple of kDecodeBlock. While a block is in L1 it costs little to make its logits weights; a second walk over all
// logits took as long as a third of the products.
template <class Products>
void anchor_weights(const foveate_anchor& anchor, int tile, int kv_head, int64_t first, int64_t last, float* weights,
                    AnchorBlock* blocks, int64_t width, void* scratch) {
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
    int current = 0;
    cursor.fill(state.blocks[0], kDecodeBlock);
    for (int64_t at = first; state.blocks[current].count > 0; at += kDecodeBlock) {
        KeyBlock<Row>& block = state.blocks[current];
        block.load_scales();
        KeyBlock<Row>& next = state.blocks[1 - current];
        cursor.fill(next, kDecodeBlock);
        Ahead<Row> ahead(next, call.head_dim);
        state.products.logits(block, ahead, state.weights);
        for (int h = 0; h < group; ++h) {
            float* own = state.weights + h * kDecodeBlock;
            // Finite, also where q times k overflowed to -inf for every key of a block: such keys have no weight.
            const float reference = larger(exponents<S>(call, block, own), -3e38f);
            F sums = S::zero();
            for (int k = 0; k < block.count; k += W) {
                const F weight = S::template exp2<true>(S::sub(S::load(own + k), S::set(reference)));
                S::store(weights + h * width + at + k, weight);
                sums = S::add(sums, weight);
            }
            blocks[(h * width + at) / kDecodeBlock] = {reference, S::sum(sums)};
        }
        current = 1 - current;
    }
}

// Adds the shares of one KV head's group, ``count`` keys, to ``scores``. To be called once: blocks are used up.
template <class S>
void anchor_add(const foveate_anchor& anchor, int kv_head, int64_t count, const float* weights, AnchorBlock* blocks,
                int64_t width, float* scores) {
    using F = typename S::F;
    constexpr int W = S::W;
    const foveate_attention& call = anchor.attention;
    const int group = heads_per_kind(call);
    const int64_t of_head = width / kDecodeBlock, used = (count + kDecodeBlock - 1) / kDecodeBlock;
    for (int h = 0; h < group; ++h) {  // what a block's weights are to be multiplied by takes the place of its sum
        AnchorBlock* own = blocks + h * of_head;
        float reference = -kInfinity, sum = 0.0f;
        for (int64_t b = 0; b < used; ++b) reference = larger(reference, own[b].reference);
        for (int64_t b = 0; b < used; ++b) {
            own[b].reference = std::exp2(own[b].reference - reference);
            sum += own[b].sum * own[b].reference;
        }
        if (call.sinks) sum += std::exp2(call.sinks[kv_head * group + h] * kLog2E - reference);
        for (int64_t b = 0; b < used; ++b) own[b].sum = own[b].reference / sum;
    }
    // Rows of weights are a power of 2 apart, and meet in one set of a cache: each gives a run of four vectors at a time.
    constexpr int kRun = 4;
    for (int64_t at = 0; at < count; at += kRun * W) {
        F totals[kRun];
        for (int i = 0; i < kRun; ++i) totals[i] = S::load(scores + at + i * W);
        for (int h = 0; h < group; ++h) {
            const F share = S::set(blocks[h * of_head + at / kDecodeBlock].sum);
            for (int i = 0; i < kRun; ++i) totals[i] = S::fma(S::load(weights + h * width + at + i * W), share, totals[i]);
        }
        for (int i = 0; i < kRun; ++i) S::store(scores + at + i * W, totals[i]);
    }
}

}  // namespace
