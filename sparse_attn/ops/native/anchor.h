// Anchor scores of one tile and KV head, in one pass over the keys.
//
// The weights of the online softmax are what prefill.h makes of the logits; instead of being multiplied with values,
// they are kept for all keys at once, each block with the reference that its exponents had. At the end the sums are
// known, and a second walk over the weights, not over the logits, adds up each key's column. It reads them in the order
// they lie in, which memory is fast enough for. Cutting the columns until their weights stayed in a cache cost more,
// since each cut reads the keys again: 32,768 keys, 224 columns of float32, 0.76 s a chunk of 512 where it is 0.49 now.
//
// With kBytes weights only rank keys, by hundreds of columns: made by a rough exponential and kept with 3 bits of mantissa
// they are off by 4 % below to 11 % above, and the call 1.17 times as fast as with a fine one and 16-bit floats, for the
// same attention among what is chosen (docs/kv-cache.md).
#pragma once

#include <type_traits>

#include "anchor_decode.h"
#include "anchor_kernels.h"
#include "prefill.h"

namespace {

constexpr int64_t kKeptBytes = 64 << 20;  // of weights at once, by all threads together, where contexts allow it
constexpr int64_t kLeastKept = 2 << 20;   // by a thread
constexpr int64_t kNearKept = 4 << 20;    // beyond that, weights are stored past the caches

template <class Engine>
struct AnchorState {
    static constexpr int W = Engine::Simd::W;
    using Kept = std::conditional_t<Engine::kBytes, uint8_t, std::conditional_t<Engine::kPairs, uint16_t, float>>;
    static constexpr int64_t kTile = W * W;  // weights of W keys and a vector of columns

    int columns;        // most query rows at once
    int64_t blocks;     // of keys
    Kept* weights;      // [blocks][kBlock / W][vectors][kTile]: keys x columns; pairs of keys if kPairs, fours if kBytes
    float* references;  // [blocks][vectors][W]
    char* pass;
    bool far;           // weights are stored past the caches, which they would leave before they are read again

    AnchorState(void* memory, const foveate_anchor& call, int tile, int64_t* bytes = nullptr) {
        const foveate_attention& attention = call.attention;
        const int group = heads_per_kind(attention), count = attention.tile_count[tile];
        blocks = (end_of(call, tile) + Engine::kBlock - 1) / Engine::kBlock;
        const int step = Engine::kVectors * W;
        const int64_t room = larger(kLeastKept, kKeptBytes / attention.num_threads);
        const int64_t fitting = room / (blocks * Engine::kBlock * int64_t(sizeof(Kept))) / step * step;
        columns = int(larger<int64_t>(group, smaller<int64_t>(count * group, larger<int64_t>(step, fitting)) / group * group));
        Arena arena(memory);
        const int vectors = round_up((columns + W - 1) / W, Engine::kVectors);
        weights = arena.take<Kept>(blocks * vectors * Engine::kBlock * W);
        far = blocks * vectors * Engine::kBlock * W * int64_t(sizeof(Kept)) > kNearKept;
        references = arena.take<float>(blocks * vectors * W);
        int64_t inner = 0;
        PrefillState<Engine>(nullptr, attention, columns, &inner);
        pass = arena.take<char>(inner);
        if (bytes) *bytes = arena.used(memory);
    }
};

template <class Engine>
using KeptWeight = typename AnchorState<Engine>::Kept;

template <class Engine>
int64_t anchor_scratch(const foveate_anchor& call, int tile) {
    int64_t bytes = 0;
    AnchorState<Engine>(nullptr, call, tile, &bytes);
    return bytes;
}

// Stores the weights of W keys and one vector of columns, zero from ``seen`` on.
template <class Engine>
FOVEATE_INLINE void keep_tile(const float* weights, int seen, KeptWeight<Engine>* tile, bool far) {
    using Simd = typename Engine::Simd;
    constexpr int W = Simd::W;
    int k = 0;
    if constexpr (Engine::kPairs) {
        for (; k < seen; k += 2) __builtin_memcpy(tile + k * W, weights + k * W, 4 * W);
    } else {
        for (; k < seen; ++k) {
            if (far) Simd::store_past_caches(tile + k * W, Simd::load(weights + k * W));
            else Simd::store(tile + k * W, Simd::load(weights + k * W));
        }
    }
    if (k < W) __builtin_memset(tile + k * W, 0, size_t(W - k) * W * sizeof(*tile));
}

// The same from logits, which become weights on the way.
template <class Engine>
FOVEATE_INLINE void keep_bytes(const float* logits, typename Engine::Simd::F factor, typename Engine::Simd::F offset,
                               int seen, uint8_t* tile, bool far, typename Engine::Simd::F& sum) {
    using Simd = typename Engine::Simd;
    constexpr int W = Simd::W;
    int k = 0;
    for (; k < seen; k += 4) {
        typename Simd::F rows[4];
        for (int i = 0; i < 4; ++i)
            rows[i] = Simd::rough_exp2(Simd::fmsub(Simd::load(logits + (k + i) * W), factor, offset));
        sum = Simd::add(sum, Simd::add(Simd::add(rows[0], rows[1]), Simd::add(rows[2], rows[3])));  // one wait for four
        Simd::store_bytes(tile + k * W, rows, far);
    }
    if (k < W) __builtin_memset(tile + k * W, 0, size_t(W - k) * W);
}

// The weights of one block of keys and ``kVectors`` vectors of columns, in ``kept``, zero where a key is hidden.
template <class Engine>
FOVEATE_INLINE void keep_weights(const foveate_attention& call, PrefillState<Engine>& state, Engine& engine,
                                 const KeyBlock<typename Engine::Row>& block, int v, KeptWeight<Engine>* kept,
                                 float* references, bool far) {
    using Simd = typename Engine::Simd;
    using F = typename Simd::F;
    constexpr int W = Simd::W, C = Engine::kVectors, kBlock = Engine::kBlock;
    constexpr int64_t kTile = AnchorState<Engine>::kTile;
    const int32_t* high = state.high + v * W;
    const int last = first_above(block.positions, block.count, high[C * W - 1]);
    const bool masked = last > 0 && block.positions[last - 1] > high[0];
    if (last > 0)
        engine.logits(block, state.queries + int64_t(v) * Engine::units(call.head_dim) * W, state.logits, 0, last);
    for (int c = 0; c < C; ++c) {
        float* logits = state.logits + c * kBlock * W;
        const auto tile_of = [&](int chunk) { return kept + (int64_t(chunk) * state.vectors + c) * kTile; };
        if constexpr (Engine::kBytes) {
            // No slack above 1: bytes have few exponents, and keys far below a sink need the low ones.
            const F reference = raise_reference<Engine>(call, state, v + c, logits, block, 0, last, masked, 0.0f, 0);
            const F factor = Simd::set(exponent_unit(call) * Simd::kRoughUnit);
            const F offset = Simd::sub(Simd::mul(Simd::finite(reference), factor), Simd::set(Simd::kRoughZero));
            F sum = Simd::load(state.sums + (v + c) * W);
            for (int k = last; k % 4; ++k) Simd::store(logits + k * W, Simd::set(-kInfinity));
            for (int chunk = 0; chunk * W < block.count; ++chunk)
                keep_bytes<Engine>(logits + chunk * W * W, factor, offset, smaller(W, last - chunk * W), tile_of(chunk), far, sum);
            Simd::store(state.sums + (v + c) * W, sum);
        } else {
            const int padded = smaller(round_up(last, Engine::kPad), kBlock);
            if (last > 0)
                softmax<Engine>(call, state, v + c, logits, block, 0, last, padded, masked);
            for (int chunk = 0; chunk * W < block.count; ++chunk)
                keep_tile<Engine>(logits + chunk * W * W, smaller(W, last - chunk * W), tile_of(chunk), far);
        }
        Simd::store(references + c * W, Simd::load(state.reference + (v + c) * W));
    }
}

// Adds up the columns of one block: ``scores[key] += sum over columns of weight * share``.
template <class Engine>
FOVEATE_INLINE void add_columns(const KeptWeight<Engine>* kept, const float* shares, int vectors, int count,
                                float* scores) {
    using Simd = typename Engine::Simd;
    using F = typename Simd::F;
    constexpr int W = Simd::W;
    constexpr int64_t kTile = AnchorState<Engine>::kTile;
    for (int k = 0; k < count; k += W) {
        F sums[W];
        for (int i = 0; i < W; ++i) sums[i] = Simd::zero();
        for (int v = 0; v < vectors; ++v, kept += kTile) {
            const F share = Simd::load(shares + v * W);
            if constexpr (Engine::kBytes) {
                for (int i = 0; i < W; i += 4) {
                    F rows[4];
                    Simd::load_bytes(kept + i * W, rows);
                    for (int j = 0; j < 4; ++j) sums[i + j] = Simd::fma(rows[j], share, sums[i + j]);
                }
            } else if constexpr (Engine::kPairs) {
                for (int i = 0; i < W; i += 2) {
                    const __m512i both = _mm512_loadu_si512(kept + i * W);
                    sums[i] = Simd::fma(_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), share, sums[i]);
                    sums[i + 1] = Simd::fma(
                        _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000u)))), share, sums[i + 1]);
                }
            } else {
                for (int i = 0; i < W; ++i) sums[i] = Simd::fma(Simd::load(kept + i * W), share, sums[i]);
            }
        }
        Simd::transpose(sums);
        F total = Simd::load(scores + k);
        for (int i = 0; i < W; ++i) total = Simd::add(total, sums[i]);
        Simd::store(scores + k, total);
    }
}

// Pools some queries of a tile.
template <class Engine>
void pool_part(const foveate_anchor& anchor, const PrefillItem& item, const AnchorState<Engine>& kept, float* scores) {
    using Simd = typename Engine::Simd;
    using F = typename Simd::F;
    using Row = typename Engine::Row;
    constexpr int W = Simd::W, C = Engine::kVectors, kBlock = Engine::kBlock;
    const foveate_attention& call = anchor.attention;
    const int group = heads_per_kind(call), rows = item.count * group;
    PrefillState<Engine> state(kept.pass, call, rows);
    load_queries<Engine>(call, item, state);
    KeyCursor<Row> cursor(call, item.sequence, item.kind, 0, end_of(item), false);
    Engine engine(state.engine, call.head_dim);
    KeyBlock<Row>& block = state.blocks[0];
    const int64_t of_block = int64_t(state.vectors) * kBlock * W;
    int64_t blocks = 0;
    int last_count = 0;
    float unreadable = 0.0f;
    for (cursor.fill(block, kBlock); block.count > 0; cursor.fill(block, kBlock), ++blocks) {
        block.load_scales();
        engine.load_keys(block);
        last_count = block.count;
        if constexpr (Engine::kBytes)  // which have no NaN: a row that reads as NaN makes all scores that
            for (int i = 0; i < block.count; ++i) unreadable += block.key_scales[i] * 0.0f;
        for (int v = 0; v < state.vectors; v += C)
            keep_weights<Engine>(call, state, engine, block, v,
                                 kept.weights + blocks * of_block + v * AnchorState<Engine>::kTile,
                                 kept.references + (blocks * state.vectors + v) * W, kept.far);
    }

    const bool cap = call.softcap != 0.0f;
    const float scale = cap ? 1.0f : call.scale;
    for (int row = 0; row < state.vectors * W; ++row) {
        float sum = state.sums[row] + unreadable;
        if (call.sinks) {
            const float sink = std::exp(call.sinks[item.kind * group + row % group] - state.reference[row] * scale);
            if constexpr (Engine::kBytes) sum += sink * Simd::kRoughMean;
            else sum += sink;
        }
        if constexpr (Engine::kBytes) sum *= Simd::kBytesScale;
        state.sums[row] = row < rows ? 1.0f / sum : 0.0f;  // columns behind the last repeat it
    }
    const F factor = Simd::set(scale * kLog2E);
    float* shares = state.outputs;  // [vectors][W]: no values are summed here
    for (int64_t b = 0; b < blocks; ++b) {
        const float* references = kept.references + b * state.vectors * W;
        for (int at = 0; at < state.vectors * W; at += W) {
            // References that were -inf belong to blocks without a visible key.
            const F moved = Simd::sub(Simd::load(references + at), Simd::load(state.reference + at));
            Simd::store(shares + at, Simd::mul(Simd::template exp2<true>(Simd::mul(moved, factor)), Simd::load(state.sums + at)));
        }
        add_columns<Engine>(kept.weights + b * of_block, shares, state.vectors,
                            b + 1 < blocks ? kBlock : last_count, scores + b * kBlock);
    }
}

template <class Engine>
void anchor_pool(const foveate_anchor& call, int tile, int kv_head, float* scores, void* scratch) {
    const foveate_attention& attention = call.attention;
    const AnchorState<Engine> kept(scratch, call, tile);
    const int queries = kept.columns / heads_per_kind(attention), count = attention.tile_count[tile];
    const int step = int(call.query_step);
    for (int done = 0; done < count; done += queries) {
        const PrefillItem item{tile, attention.tile_sequence[tile], attention.tile_start[tile] + done * step,
                               smaller(queries, count - done), attention.tile_position[tile] + done * step, kv_head, step};
        pool_part<Engine>(call, item, kept, scores);
    }
}

// Calls ``found(k)`` for the scores[first..end), in order, whose order lies within low..high. Readable up to a multiple
// of 16.
template <class S, class Found>
FOVEATE_INLINE void each_within(const float* scores, int64_t first, int64_t end, int32_t low, int32_t high, Found found) {
    using L = Lanes<S>;
    constexpr int64_t W = S::W;
    const typename S::I under = S::set_int(low - 1), most = S::set_int(high);
    for (int64_t at = first / W * W; at < end; at += W) {
        const typename S::I order = L::order(scores + at);
        uint32_t within = L::bits(L::above(order, under)) & ~L::bits(L::above(order, most));
        if (at < first) within &= ~uint32_t(first_bits(first - at));
        if (at + W > end) within &= uint32_t(first_bits(end - at));
        for (; within; within &= within - 1) found(at + __builtin_ctz(within));
    }
}

// The ``budget`` largest of scores[first..end), none of them negative, the earliest of equals, in order; returns how
// many. Three rounds of counting find the order of the smallest one chosen; only the first looks at every score by itself.
template <class S>
int choose(const float* scores, int64_t first, int64_t end, int64_t budget, int32_t* indices) {
    if (budget <= 0 || end <= first) return 0;
    int count = 0;
    if (end - first <= budget) {
        for (int64_t k = first; k < end; ++k) indices[count++] = int32_t(k);
        return count;
    }
    constexpr int kShifts[3] = {21, 11, 0}, kTables = 4, kBins = 1024;
    int32_t counts[kTables * kBins] = {};
    // Neighbours are alike, and would wait for each other's count.
    for (int64_t k = first; k < end; ++k) ++counts[k % kTables * kBins + (order_of(scores[k]) >> kShifts[0])];
    for (int i = 0; i < kBins; ++i)
        for (int table = 1; table < kTables; ++table) counts[i] += counts[table * kBins + i];
    int64_t left = budget;  // to be chosen among those whose order lies within low..high
    int32_t low = 0, high = 0x7fffffff;
    for (int round = 0; round < 3; ++round) {
        const int shift = kShifts[round];
        int bin = (high - low) >> shift;
        if (round > 0) {
            __builtin_memset(counts, 0, size_t(bin + 1) * sizeof(*counts));
            each_within<S>(scores, first, end, low, high, [&](int64_t k) { ++counts[(order_of(scores[k]) - low) >> shift]; });
        }
        for (; counts[bin] < left; --bin) left -= counts[bin];
        low += bin << shift;
        high = low + ((1 << shift) - 1);
    }
    each_within<S>(scores, first, end, low, 0x7fffffff, [&](int64_t k) {
        if (order_of(scores[k]) > low || left-- > 0) indices[count++] = int32_t(k);
    });
    return count;
}

// ``Products`` is what decode takes.
template <class Engine, class Products>
constexpr AnchorKernels anchor_kernels_of(void (*begin)() = nothing, void (*end)() = nothing) {
    return {
        anchor_scratch<Engine>, anchor_pool<Engine>, anchor_weights_scratch<Products>, anchor_weights<Products>,
        anchor_add<typename Products::Simd>, choose<typename Products::Simd>, begin, end,
    };
}

}  // namespace
