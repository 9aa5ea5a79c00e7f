// Keys above a threshold. In decode every key is scored, and only the values of those that are read are loaded; in
// prefill, where keys that some query of a tile reads are nearly all, their weights become 0.
//
// As in decode.h a work item is a part of one sequence's keys for one KV head. The values of a block that some head of
// the group reads are fetched while the next block is scored, and each head sums up its own after that.
#pragma once

#include "decode.h"
#include "lanes.h"

namespace {

// What an item leaves per head, before the outputs [D]; behind the heads stands the sum of the part's values [D].
enum ThresholdPartial { kReference, kSum, kDropped, kCount, kPeak, kThresholdHead };

inline int64_t threshold_partial(const foveate_attention& call) {
    const int64_t sums = call.threshold->value_sums ? call.head_dim : 0;
    return int64_t(heads_per_kind(call)) * (call.head_dim + kThresholdHead) + sums;
}

// What a head's choosing and summing up takes per block, in keys of the products.
constexpr int kHeadWork = 12;

template <class Products>
struct ThresholdState {
    using Row = typename Products::Row;
    Products products;
    // Of three blocks: the one whose values are arriving, the one that is scored, and the one whose keys are arriving.
    KeyBlock<Row>* blocks;
    float* weights;   // [3][group][kDecodeBlock]
    uint64_t* bits;   // [3][group][kDecodeWords] which keys a head reads
    const Row** read; // [kDecodeBlock] values that some head reads

    ThresholdState(Arena& arena, const foveate_attention& call)
        : products(arena, call),
          blocks(arena.take<KeyBlock<Row>>(3)),
          weights(arena.take<float>(int64_t(3) * heads_per_kind(call) * kDecodeBlock)),
          bits(arena.take<uint64_t>(int64_t(3) * heads_per_kind(call) * kDecodeWords)),
          read(arena.take<const Row*>(kDecodeBlock)) {}
};

// Sums of the values at positions [first, last) of a sequence, whole pages by their statistic. ``last`` ends a page or
// the context; ``context`` bounds what may be read as a whole page, which can hold tokens behind the query.
template <class S, class Row>
void add_values(const foveate_attention& call, int sequence, int kv_head, int64_t first, int64_t last, float* sums) {
    constexpr int W = S::W;
    const int64_t size = call.page_size, dim = call.head_dim, context = call.context_lens[sequence];
    const int32_t* table = call.block_tables + sequence * call.table_stride;
    for (int64_t d = 0; d < dim; ++d) sums[d] = 0.0f;
    // A page belongs to the part that its first position lies in.
    for (int64_t page = (first + size - 1) / size; page * size < last; ++page) {
        const int64_t at = int64_t(table[page]) * call.num_kv_heads + kv_head;
        if ((page + 1) * size <= context) {
            const float* source = call.threshold->value_sums + at * dim;
            for (int64_t d = 0; d < dim; d += W) S::store(sums + d, S::add(S::load(sums + d), S::load(source + d)));
            continue;
        }
        const Row* rows = static_cast<const Row*>(call.values) + at * size * dim;
        for (int64_t row = 0; row < context - page * size; ++row) {
            typename S::F scale = S::set(1.0f);
            if constexpr (KeyBlock<Row>::kScaled) scale = S::set(call.value_scales[at * size + row]);
            for (int64_t d = 0; d < dim; d += W)
                S::store(sums + d, S::fma(S::load(rows + row * dim + d), scale, S::load(sums + d)));
        }
    }
}

// Marks the keys of a block that one head reads, and brings its logits to exponents of 2. Returns the highest.
template <class S, class Row>
float choose(const foveate_attention& call, const KeyBlock<Row>& block, float theta, int64_t position, float* logits,
             uint64_t* bits) {
    using F = typename S::F;
    constexpr int W = S::W;
    const bool cap = call.softcap != 0.0f;
    const F scale = S::set(call.scale), unit = S::set(kLog2E), least = S::set(theta);
    // The keys of a block stand side by side: those that are always read are its first and its last ones.
    const int64_t sinks = call.threshold->sink_tokens - block.positions[0];
    const int64_t recent = position + 1 - call.threshold->recent_tokens - block.positions[0];
    F top = S::set(-kInfinity);
    for (int word = 0; word < kDecodeWords; ++word) {
        const int first = word * 64, end = smaller(first + 64, block.count);
        uint64_t read = 0;
        for (int at = first; at < end; at += W) {
            F x = S::load(logits + at);
            if constexpr (KeyBlock<Row>::kScaled) x = S::mul(x, S::load(block.key_scales + at));
            x = cap ? capped<S>(x, call.scale, call.softcap) : S::mul(x, scale);
            read |= uint64_t(Lanes<S>::bits(Lanes<S>::above(x, least))) << (at - first);
            x = S::mul(x, unit);
            if (at + W > end) x = S::first_lanes(x, end - at);
            S::store(logits + at, x);
            top = S::max(top, x);
        }
        read |= first_bits(sinks - first) | ~first_bits(recent - first);
        bits[word] = read & first_bits(end - first);
    }
    return S::highest(top);
}

// Turns the logits of one head, brought to exponents, into weights: 0 for what it does not read.
template <class S>
void weigh(int count, const uint64_t* bits, float* weights, float* own) {
    using F = typename S::F;
    constexpr int W = S::W;
    const F reference = S::set(own[kReference]);
    F sum = S::zero(), rest = S::zero();
    int read = 0;
    for (int word = 0; word < kDecodeWords; ++word) read += __builtin_popcountll(bits[word]);
    for (int at = 0; at < count; at += W) {
        const F weight = S::template exp2<true>(S::sub(S::load(weights + at), reference));
        const F kept = Lanes<S>::keep(Lanes<S>::from_bits(uint32_t(bits[at / 64] >> (at % 64))), weight);
        S::store(weights + at, kept);
        sum = S::add(sum, kept);
        rest = S::add(rest, S::sub(weight, kept));
    }
    own[kSum] += S::sum(sum);
    own[kDropped] += S::sum(rest);
    own[kCount] += float(read);
}

template <class Products>
void threshold_item(const foveate_attention& call, const DecodeItem& item, float* partial, void* scratch) {
    using S = typename Products::Simd;
    using T = typename Products::T;
    using Row = typename Products::Row;
    const int group = heads_per_kind(call), dim = call.head_dim;
    const foveate_threshold& threshold = *call.threshold;
    Arena arena(scratch);
    ThresholdState<Products> state(arena, call);
    Products& products = state.products;
    products.start(static_cast<const T*>(call.query) + item.query * call.query_token_stride +
                       item.kind * group * call.query_head_stride,
                   call.query_head_stride);
    const int64_t stride = dim + kThresholdHead;
    for (int h = 0; h < group; ++h) {
        float* own = partial + h * stride;
        own[kReference] = own[kPeak] = -kInfinity;
        own[kSum] = own[kDropped] = own[kCount] = 0.0f;
    }
    if (threshold.value_sums)
        add_values<S, Row>(call, item.sequence, item.kind, item.first, item.last, partial + group * stride);
    const float* theta = threshold.theta + int64_t(item.query) * call.num_heads + item.kind * group;
    KeyCursor<Row> cursor(call, item.sequence, item.kind, item.first, item.last, true);
    auto weights_of = [&](int block, int head) { return state.weights + (block * group + head) * kDecodeBlock; };
    auto bits_of = [&](int block, int head) { return state.bits + (block * group + head) * kDecodeWords; };
    auto sum_values = [&](int block, int head) {
        products.accumulate_marked(state.blocks[block], bits_of(block, head), head, weights_of(block, head));
    };
    int before = 2, current = 0, next = 1, num_read = 0;
    state.blocks[before].count = state.blocks[current].count = 0;
    if (item.first < item.last) cursor.fill(state.blocks[current], kDecodeBlock);
    while (state.blocks[current].count > 0) {
        KeyBlock<Row>& block = state.blocks[current];
        block.load_scales();
        cursor.fill(state.blocks[next], kDecodeBlock);
        Ahead<Row> ahead(state.blocks[next], dim, state.read, num_read, kDecodeBlock + group * kHeadWork);
        products.logits(block, ahead, weights_of(current, 0));
        uint64_t any[kDecodeWords] = {};
        for (int h = 0; h < group; ++h) {
            float* own = partial + h * stride;
            uint64_t* bits = bits_of(current, h);
            sum_values(before, h);
            ahead.advance(kHeadWork / 2);
            const float highest = choose<S, Row>(call, block, theta[h], item.position, weights_of(current, h), bits);
            ahead.advance(kHeadWork / 2);
            for (int word = 0; word < kDecodeWords; ++word) any[word] |= bits[word];
            own[kPeak] = larger(own[kPeak], highest);
            if (highest > own[kReference] + kSlack) {
                const float ratio = std::exp2(own[kReference] - highest);
                own[kReference] = highest;
                own[kSum] *= ratio;
                own[kDropped] *= ratio;
                products.shrink(h, ratio);
            }
            if (!threshold.read_together) weigh<S>(block.count, bits, weights_of(current, h), own);
        }
        for (int h = 0; h < group && threshold.read_together; ++h) {
            for (int word = 0; word < kDecodeWords; ++word) bits_of(current, h)[word] = any[word];
            weigh<S>(block.count, any, weights_of(current, h), partial + h * stride);
        }
        num_read = 0;
        for (int word = 0; word < kDecodeWords; ++word)
            for (uint64_t rest = any[word]; rest; rest &= rest - 1)
                state.read[num_read++] = block.values[word * 64 + __builtin_ctzll(rest)];
        const int free = before;
        before = current;
        current = next;
        next = free;
    }
    for (int h = 0; h < group; ++h) sum_values(before, h);
    const float* outputs = products.finish();
    for (int h = 0; h < group; ++h)
        for (int d = 0; d < dim; ++d) partial[h * stride + kThresholdHead + d] = outputs[int64_t(h) * dim + d];
}

// Brings the parts of one query's keys to one reference, compensates, and writes out, log-sum-exp and counts.
template <class Products>
void threshold_merge(const foveate_attention& call, int query, int kind, const float* partials, int parts) {
    using S = typename Products::Simd;
    using T = typename Products::T;
    constexpr int W = S::W;
    const int group = heads_per_kind(call), dim = call.head_dim;
    const int64_t size = threshold_partial(call), stride = dim + kThresholdHead;
    const int64_t position = int64_t(call.context_lens[query]) - 1;  // one query per sequence
    const foveate_threshold& threshold = *call.threshold;
    for (int h = 0; h < group; ++h) {
        const int head = kind * group + h;
        const int64_t place = int64_t(query) * call.num_heads + head;
        const float* own = partials + h * stride;
        float reference = -kInfinity, peak = -kInfinity, sum = 0.0f, dropped = 0.0f, count = 0.0f;
        for (int p = 0; p < parts; ++p) reference = larger(reference, own[p * size + kReference]);
        auto ratio = [&](int p) {
            const float part = own[p * size + kReference];
            return part > -kInfinity ? std::exp2(part - reference) : 0.0f;
        };
        for (int p = 0; p < parts; ++p) {
            const float* part = own + p * size;
            peak = larger(peak, part[kPeak]);
            sum += part[kSum] * ratio(p);
            dropped += part[kDropped] * ratio(p);
            count += part[kCount];
        }
        const Compensated result = compensate(call, place, head, position, reference / kLog2E, peak / kLog2E, sum,
                                              dropped, int64_t(count));
        call.lse[place] = result.lse;
        threshold.kept[place] = int32_t(count);
        T* out = static_cast<T*>(call.out) + place * dim;
        const float lost = threshold.value_sums ? result.lost / float(position + 1) : 0.0f;
        for (int d = 0; d < dim; d += W) {
            typename S::F total = S::zero(), values = S::zero();
            for (int p = 0; p < parts; ++p) {
                const float* part = own + p * size;
                total = S::fma(S::load(part + kThresholdHead + d), S::set(ratio(p) * result.factor), total);
                if (threshold.value_sums) values = S::add(values, S::load(partials + p * size + group * stride + d));
            }
            S::store(out + d, S::fma(values, S::set(lost), total));
        }
    }
}

template <class Products>
int64_t threshold_scratch(const foveate_attention& call) {
    Arena arena(nullptr);
    ThresholdState<Products> state(arena, call);
    return arena.used(nullptr);
}

template <class Engine>
void softmax_above(const foveate_attention& call, PrefillState<Engine>& state, int v, float* logits,
                   const KeyBlock<typename Engine::Row>& block, int first, int last, int padded, bool masked) {
    using Simd = typename Engine::Simd;
    using F = typename Simd::F;
    using L = Lanes<Simd>;
    using M = typename L::M;
    constexpr int W = Simd::W;
    const bool cap = call.softcap != 0.0f;
    const F nothing = Simd::set(-kInfinity);
    F top = nothing;
    const typename Simd::I high = Simd::load_int(state.high + v * W), low = Simd::load_int(state.low + v * W);
    for (int k = first; k < last; ++k) {
        F s = Simd::load(logits + k * W);
        if (cap) s = capped<Simd>(s, call.scale, call.softcap);
        if (masked) s = Simd::visible(s, Simd::set_int(block.positions[k]), high, low);
        if (cap || masked) Simd::store(logits + k * W, s);
        top = Simd::max(top, s);
    }
    Simd::store(state.peaks + v * W, Simd::max(Simd::load(state.peaks + v * W), top));

    // Logits times this are exponents of 2.
    const float unit = cap ? kLog2E : call.scale * kLog2E;
    const F factor = Simd::set(unit);
    F reference = Simd::load(state.reference + v * W);
    F sum = Simd::load(state.sums + v * W), dropped = Simd::load(state.dropped + v * W);
    if (Simd::any_above(top, Simd::add(reference, Simd::set(kSlack / unit)))) {
        const F moved = Simd::max(reference, top);
        const F shrink = Simd::template exp2<true>(Simd::mul(Simd::sub(reference, Simd::finite(moved)), factor));
        float* output = state.outputs + int64_t(v) * call.head_dim * W;
        for (int d = 0; d < call.head_dim; ++d) Simd::store(output + d * W, Simd::mul(Simd::load(output + d * W), shrink));
        sum = Simd::mul(sum, shrink);
        dropped = Simd::mul(dropped, shrink);
        reference = moved;
        Simd::store(state.reference + v * W, reference);
    }
    const F offset = Simd::mul(Simd::finite(reference), factor);
    const F scale = Simd::set(cap ? 1.0f : call.scale), theta = Simd::load(state.theta + v * W);
    const typename Simd::I recent = Simd::load_int(state.recent + v * W);
    typename Simd::I count = Simd::load_int(state.counts + v * W);
    const int sinks = call.threshold->sink_tokens;
    // Columns ascend in position, so the first lane's are the earliest that are always read.
    const bool always = block.positions[first] < sinks || block.positions[last - 1] > state.recent[v * W];
    auto weight = [&](int k) {
        const F s = Simd::load(logits + k * W);
        M read = L::above(Simd::mul(s, scale), theta);
        if (always) {
            const bool sink = block.positions[k] < sinks;
            read = L::either(read, L::above(Simd::set_int(sink ? 1 : block.positions[k]), sink ? Simd::set_int(0) : recent));
            read = L::both(read, L::above(s, nothing));
        }
        const F every = Simd::template exp2<!Engine::kPairs>(Simd::fmsub(s, factor, offset));
        const F kept = L::keep(read, every);
        sum = Simd::add(sum, kept);
        dropped = Simd::add(dropped, Simd::sub(every, kept));
        count = L::count(read, count);
        return kept;
    };
    int k = first;
    if constexpr (Engine::kPairs) {
        for (; k < last; k += 2) {
            const F a = weight(k);
            Engine::store_pair(logits + k * W, a, k + 1 < last ? weight(k + 1) : Simd::zero());
        }
        for (; k < padded; k += 2) Simd::store(logits + k * W, Simd::zero());
    } else {
        for (; k < last; ++k) Simd::store(logits + k * W, weight(k));
    }
    Simd::store(state.sums + v * W, sum);
    Simd::store(state.dropped + v * W, dropped);
    L::store(state.counts + v * W, count);
}

// Prompts: of ``Engine``, or of ``Above`` where keys are chosen by a threshold.
template <class Engine, class Above>
void either_item(const foveate_attention& call, const PrefillItem& item, void* scratch) {
    if (call.threshold) prefill_item<Above>(call, item, scratch);
    else prefill_item<Engine>(call, item, scratch);
}

template <class Engine, class Above>
int64_t either_scratch(const foveate_attention& call, int rows) {
    return call.threshold ? prefill_scratch<Above>(call, rows) : prefill_scratch<Engine>(call, rows);
}

// The table of one instruction set and element type.
template <class Engine, class Products, class Gathered = Engine, class Above = Engine>
constexpr IsaKernels threshold_kernels_of() {
    IsaKernels kernels = kernels_of<Engine, Products, Gathered>();
    kernels.prefill_scratch = either_scratch<Engine, Above>;
    kernels.prefill = either_item<Engine, Above>;
    kernels.threshold_scratch = threshold_scratch<Products>;
    kernels.threshold = threshold_item<Products>;
    kernels.threshold_merge = threshold_merge<Products>;
    kernels.threshold_partial = threshold_partial;
    return kernels;
}

}  // namespace
