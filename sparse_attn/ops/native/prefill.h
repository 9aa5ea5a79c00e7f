// Prefill of one work item: blocks of keys against columns of queries, with an online softmax.
//
// Logits are kept transposed, keys down and queries across: a vector holds one key's logits for W queries. So the
// maximum and the sum of a softmax run down the rows without one shuffle, a key row is read where it lies in its page,
// and a causal mask is one comparison with the vector of the queries' positions. The GQA group is folded into the
// columns: column ``c`` is query ``c / group`` and head ``c % group`` of the item.
//
// An Engine supplies the two products; see fma_engine.h and amx_engine.h:
//   Simd, T             vectors, and the type of queries and results
//   Row                 the type of K and V in memory: T, or int8 (see quantised.h)
//   kVectors, kBlock    vectors of columns per pass; keys per block, a multiple of 32
//   kPairs              weights leave the softmax as pairs of bfloat16 (two keys of one query in 32 bits)
//   kWords              or as pairs of words, and a column's levels are worth something (see word_values.h, whose engine
//                       has ``choose_levels``, ``levels`` and ``sound``, and accumulates by what levels are worth)
//   kBytes              anchors (anchor.h) keep weights as bytes
//   kPad                keys that the products round up to
//   units(dim)          32-bit units of a query row: channels, or pairs of them
//   pack(...)           W query rows to the columns of a vector
//   scratch(dim)        bytes of its own
//   load(block)         makes ready a block of keys for all columns
//   logits(...)         S[v][key][W] of ``kVectors`` vectors
//   accumulate(...)     O[v][channel][W] += weights x values
#pragma once

#include "columns.h"
#include "keys.h"
#include "lanes.h"
#include "work.h"

namespace {

// The exponent's reference only moves when a logit outgrows it by more than 2^8: float32 sums have room for that, and
// the accumulators are rescaled once or twice per item instead of once per block.
constexpr float kSlack = 8.0f;

// Memory of one item, carved from a thread's scratch.
class Arena {
public:
    explicit Arena(void* memory) : next_(static_cast<char*>(memory)) {}
    template <class U>
    U* take(int64_t count) {
        U* result = reinterpret_cast<U*>(next_);
        next_ += (count * int64_t(sizeof(U)) + 63) / 64 * 64;
        return result;
    }
    int64_t used(const void* start) const { return next_ - static_cast<const char*>(start); }

private:
    char* next_;
};

template <class Engine>
struct PrefillState {
    using Simd = typename Engine::Simd;
    using Row = typename Engine::Row;
    static constexpr int W = Simd::W;

    int vectors;       // vectors of columns, a multiple of Engine::kVectors
    float* queries;    // [vectors][units][W] 32-bit units
    float* outputs;    // [vectors][dim][W]
    float* reference;  // [vectors][W] of the exponents, in units of the logits
    float* sums;       // [vectors][W]
    int32_t* high;     // [vectors][W] column sees positions low < p <= high
    int32_t* low;
    // Where keys are chosen by a threshold: [vectors][W] each.
    float* theta;
    float* dropped;    // sum of the weights left out
    float* peaks;      // largest visible logit
    int32_t* recent;   // column reads positions above it anyway
    int32_t* counts;   // keys read
    float* logits;     // [kVectors][kBlock][W]
    float* worths;     // [kVectors][W] of weights as words
    KeyBlock<Row>* blocks;  // [2]
    char* engine;

    PrefillState(void* memory, const foveate_attention& call, int rows, int64_t* bytes = nullptr) {
        Arena arena(memory);
        vectors = round_up((rows + W - 1) / W, Engine::kVectors);
        queries = arena.take<float>(int64_t(vectors) * Engine::units(call.head_dim) * W);
        outputs = arena.take<float>(int64_t(vectors) * call.head_dim * W);
        reference = arena.take<float>(vectors * W);
        sums = arena.take<float>(vectors * W);
        high = arena.take<int32_t>(vectors * W);
        low = arena.take<int32_t>(vectors * W);
        const int64_t columns = call.threshold ? vectors * W : 0;
        theta = arena.take<float>(columns);
        dropped = arena.take<float>(columns);
        peaks = arena.take<float>(columns);
        recent = arena.take<int32_t>(columns);
        counts = arena.take<int32_t>(columns);
        logits = arena.take<float>(int64_t(Engine::kVectors) * Engine::kBlock * W);
        worths = arena.take<float>(Engine::kWords ? Engine::kVectors * W : 0);
        blocks = arena.take<KeyBlock<Row>>(2);
        engine = arena.take<char>(Engine::scratch(call.head_dim));
        if (bytes) *bytes = arena.used(memory);
    }
};

// Copies the item's query rows into columns, and sets up what is kept per column.
template <class Engine>
void load_queries(const foveate_attention& call, const PrefillItem& item, PrefillState<Engine>& state) {
    using Simd = typename Engine::Simd;
    using T = typename Engine::T;
    constexpr int W = Simd::W;
    const int group = heads_per_kind(call), rows = item.count * group;
    const int units = Engine::units(call.head_dim), dim = call.head_dim;
    for (int v = 0; v < state.vectors; ++v) {
        const T* source[W];
        for (int lane = 0; lane < W; ++lane) {
            // Columns behind the last repeat it: their results are dropped.
            const int row = smaller(v * W + lane, rows - 1);
            const int query = row / group, head = item.kind * group + row % group;
            source[lane] = static_cast<const T*>(call.query) + (item.start + query * item.step) * call.query_token_stride +
                           head * call.query_head_stride;
            const int64_t position = item.position + query * item.step;
            state.high[v * W + lane] = int32_t(position - call.nearest);
            state.low[v * W + lane] = int32_t(position - call.farthest);
            if (const foveate_threshold* threshold = call.threshold) {
                const int column = v * W + lane;
                state.theta[column] = threshold->theta[int64_t(item.start + query) * call.num_heads + head];
                state.recent[column] = int32_t(position - threshold->recent_tokens);
                state.dropped[column] = 0.0f;
                state.peaks[column] = -kInfinity;
                state.counts[column] = 0;
            }
        }
        Engine::pack(source, dim, state.queries + int64_t(v) * units * W);
        Simd::store(state.reference + v * W, Simd::set(-kInfinity));
        Simd::store(state.sums + v * W, Simd::zero());
        float* output = state.outputs + int64_t(v) * dim * W;
        for (int d = 0; d < dim; ++d) Simd::store(output + d * W, Simd::zero());
    }
}

template <class Simd>
FOVEATE_INLINE typename Simd::F capped(typename Simd::F s, float scale, float softcap) {
    // cap * tanh(x / cap), tanh(y) = 1 - 2 / (1 + e^2y)
    const typename Simd::F two_y = Simd::mul(s, Simd::set(2.0f * kLog2E * scale / softcap));
    // Of a number and NaN the maximum is the second.
    const typename Simd::F bounded = Simd::sub(Simd::zero(), Simd::max(Simd::set(-120.0f), Simd::sub(Simd::zero(), two_y)));
    const typename Simd::F e = Simd::template exp2<true>(bounded);
    const typename Simd::F one = Simd::set(1.0f);
    const typename Simd::F t = Simd::sub(one, Simd::div(Simd::set(2.0f), Simd::add(one, e)));
    return Simd::mul(t, Simd::set(softcap));
}

// Logits, in units of the queries' or capped, times this are exponents of 2.
static inline float exponent_unit(const foveate_attention& call) {
    return call.softcap != 0.0f ? kLog2E : call.scale * kLog2E;
}

// Caps and hides logits of keys [first, last) and one vector of columns, in place. Where they outgrow the reference by
// more than 2^slack, moves it and the sums, those of ``dim`` channels of values too. Returns the reference; ``highest`` is
// the largest logit of each column, if asked for.
template <class Engine>
FOVEATE_INLINE typename Engine::Simd::F raise_reference(const foveate_attention& call, PrefillState<Engine>& state, int v,
                                                        float* logits, const KeyBlock<typename Engine::Row>& block,
                                                        int first, int last, bool masked, float slack, int dim,
                                                        typename Engine::Simd::F* highest = nullptr) {
    using Simd = typename Engine::Simd;
    using F = typename Simd::F;
    constexpr int W = Simd::W;
    const bool cap = call.softcap != 0.0f;
    F top = Simd::set(-kInfinity);
    if (masked || cap) {
        const typename Simd::I high = Simd::load_int(state.high + v * W), low = Simd::load_int(state.low + v * W);
        for (int k = first; k < last; ++k) {
            F s = Simd::load(logits + k * W);
            if (cap) s = capped<Simd>(s, call.scale, call.softcap);
            if (masked) s = Simd::visible(s, Simd::set_int(block.positions[k]), high, low);
            Simd::store(logits + k * W, s);
            top = Simd::max(top, s);
        }
    } else {
        F tops[4] = {top, top, top, top};
        int k = first;
        for (; k + 4 <= last; k += 4)
            for (int i = 0; i < 4; ++i) tops[i] = Simd::max(tops[i], Simd::load(logits + (k + i) * W));
        for (; k < last; ++k) tops[0] = Simd::max(tops[0], Simd::load(logits + k * W));
        top = Simd::max(Simd::max(tops[0], tops[1]), Simd::max(tops[2], tops[3]));
    }

    if (highest) *highest = top;
    const float unit = exponent_unit(call);
    const F reference = Simd::load(state.reference + v * W);
    if (!Simd::any_above(top, Simd::add(reference, Simd::set(slack / unit)))) return reference;
    const F moved = Simd::max(reference, top);
    // -inf - -inf is NaN: finite() makes it 0 - 0. From -inf to a number is 2^-inf = 0.
    const F shrink = Simd::template exp2<true>(Simd::mul(Simd::sub(reference, Simd::finite(moved)), Simd::set(unit)));
    float* output = state.outputs + int64_t(v) * call.head_dim * W;
    for (int d = 0; d < dim; ++d) Simd::store(output + d * W, Simd::mul(Simd::load(output + d * W), shrink));
    Simd::store(state.sums + v * W, Simd::mul(Simd::load(state.sums + v * W), shrink));
    Simd::store(state.reference + v * W, moved);
    return moved;
}

// Turns logits of keys [first, last) and one vector of columns into weights, in place.
template <class Engine>
FOVEATE_INLINE void softmax(const foveate_attention& call, PrefillState<Engine>& state, int v, float* logits,
                            const KeyBlock<typename Engine::Row>& block, int first, int last, int padded, bool masked) {
    using Simd = typename Engine::Simd;
    using F = typename Simd::F;
    constexpr int W = Simd::W;
    const F reference =
        raise_reference<Engine>(call, state, v, logits, block, first, last, masked, kSlack, call.head_dim);
    const F factor = Simd::set(exponent_unit(call));
    F sum = Simd::load(state.sums + v * W);
    const F offset = Simd::mul(Simd::finite(reference), factor);
    auto weight = [&](int k) {
        return Simd::template exp2<!Engine::kPairs>(Simd::fmsub(Simd::load(logits + k * W), factor, offset));
    };
    if constexpr (Engine::kPairs) {
        F sums[2] = {sum, Simd::zero()};
        int k = first;
        for (; k + 4 <= last; k += 4) {
            const F a = weight(k), b = weight(k + 1), c = weight(k + 2), d = weight(k + 3);
            sums[0] = Simd::add(sums[0], Simd::add(a, b));
            sums[1] = Simd::add(sums[1], Simd::add(c, d));
            Engine::store_pair(logits + k * W, a, b);
            Engine::store_pair(logits + (k + 2) * W, c, d);
        }
        for (; k < last; k += 2) {
            const F a = weight(k), b = k + 1 < last ? weight(k + 1) : Simd::zero();
            sums[0] = Simd::add(sums[0], Simd::add(a, b));
            Engine::store_pair(logits + k * W, a, b);
        }
        for (; k < padded; k += 2) Simd::store(logits + k * W, Simd::zero());
        sum = Simd::add(sums[0], sums[1]);
    } else {
        F sums[2] = {sum, Simd::zero()};
        int k = first;
        for (; k + 2 <= last; k += 2) {
            const F a = weight(k), b = weight(k + 1);
            sums[0] = Simd::add(sums[0], a);
            sums[1] = Simd::add(sums[1], b);
            Simd::store(logits + k * W, a);
            Simd::store(logits + (k + 1) * W, b);
        }
        for (; k < last; ++k) {
            const F a = weight(k);
            sums[0] = Simd::add(sums[0], a);
            Simd::store(logits + k * W, a);
        }
        sum = Simd::add(sums[0], sums[1]);
    }
    Simd::store(state.sums + v * W, sum);
}

// The same where keys are chosen by a threshold: weights of keys that are not read become 0. In threshold.h.
template <class Engine>
void softmax_above(const foveate_attention& call, PrefillState<Engine>& state, int v, float* logits,
                   const KeyBlock<typename Engine::Row>& block, int first, int last, int padded, bool masked);

// Into words; ``state.worths`` of the vector ``c`` of the pass. In word_values.h.
template <class Engine>
void softmax_words(const foveate_attention& call, const Engine& engine, PrefillState<Engine>& state, int v, int c,
                   const KeyBlock<typename Engine::Row>& block, int first, int last, bool masked);

// Divides by the sums, turns columns back into rows, and writes out and log-sum-exp.
template <class Engine>
void store_outputs(const foveate_attention& call, const PrefillItem& item, PrefillState<Engine>& state) {
    using Simd = typename Engine::Simd;
    using F = typename Simd::F;
    using T = typename Engine::T;
    constexpr int W = Simd::W;
    const int group = heads_per_kind(call), rows = item.count * group, dim = call.head_dim;
    const float scale = call.softcap != 0.0f ? 1.0f : call.scale;
    for (int v = 0; v * W < rows; ++v) {
        const int lanes = smaller(W, rows - v * W);
        alignas(64) float share[W] = {};
        float lost[W] = {};
        int64_t place[W];
        for (int lane = 0; lane < lanes; ++lane) {
            const int row = v * W + lane, head = item.kind * group + row % group;
            place[lane] = int64_t(item.start + row / group) * call.num_heads + head;
            const float sum = state.sums[row];
            if (call.threshold) {
                const Compensated result =
                    compensate(call, place[lane], head, int64_t(item.position) + row / group, state.reference[row] * scale,
                               state.peaks[row] * scale, sum, state.dropped[row], state.counts[row]);
                call.lse[place[lane]] = result.lse;
                call.threshold->kept[place[lane]] = state.counts[row];
                share[lane] = result.factor;
                lost[lane] = result.lost;
                continue;
            }
            const float lse = sum != 0.0f ? state.reference[row] * scale + std::log(sum) : -kInfinity;
            call.lse[place[lane]] = lse;
            if (sum != 0.0f)  // NaN is passed on
                share[lane] = call.sinks ? 1.0f / (sum * (1.0f + std::exp(call.sinks[head] - lse))) : 1.0f / sum;
        }
        const F factor = Simd::load(share);
        const float* output = state.outputs + int64_t(v) * dim * W;
        for (int d = 0; d < dim; d += W) {
            F tile[W];
            for (int i = 0; i < W; ++i) tile[i] = Simd::mul(Simd::load(output + (d + i) * W), factor);
            Simd::transpose(tile);
            if (call.threshold && call.threshold->value_mean) {
                for (int lane = 0; lane < lanes; ++lane) {
                    const int64_t token = item.start + (v * W + lane) / group;
                    const float* mean = call.threshold->value_mean + (token * call.num_kv_heads + item.kind) * dim + d;
                    tile[lane] = Simd::fma(Simd::load(mean), Simd::set(lost[lane]), tile[lane]);
                }
            }
            for (int lane = 0; lane < lanes; ++lane)
                Simd::store(static_cast<T*>(call.out) + place[lane] * dim + d, tile[lane]);
        }
    }
}

FOVEATE_INLINE int first_above(const int32_t* positions, int count, int64_t bound) {
    int low = 0, high = count;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (positions[middle] > bound) high = middle;
        else low = middle + 1;
    }
    return low;
}

template <class Row>
FOVEATE_INLINE void prefetch_rows(const KeyBlock<Row>& block, int first, int last, int dim) {
    const int bytes = dim * int(sizeof(Row));
    block.prefetch_scales(first, smaller(last, block.count));
    for (int k = first; k < smaller(last, block.count); ++k)
        for (int at = 0; at < bytes; at += 64) {
            _mm_prefetch(reinterpret_cast<const char*>(block.keys[k]) + at, _MM_HINT_T1);
            _mm_prefetch(reinterpret_cast<const char*>(block.values[k]) + at, _MM_HINT_T1);
        }
}

// One block of keys for the ``kVectors`` vectors of columns from ``v`` on. False if none of them sees any of it.
template <class Engine>
FOVEATE_INLINE bool multiply(const foveate_attention& call, Engine& engine, const KeyBlock<typename Engine::Row>& block,
                             PrefillState<Engine>& state, int v) {
    constexpr int W = Engine::Simd::W, C = Engine::kVectors, kBlock = Engine::kBlock;
    const int dim = call.head_dim;
    // Columns ascend in position, so the first and the last lane bound what the pass sees.
    const int32_t* high = state.high + v * W;
    const int32_t* low = state.low + v * W;
    const int last = first_above(block.positions, block.count, high[C * W - 1]);
    const int first = first_above(block.positions, last, low[0]) / 32 * 32;
    if (first >= last) return false;
    const bool masked = block.positions[last - 1] > high[0] || block.positions[first] <= low[C * W - 1];
    const int padded = smaller(round_up(last, Engine::kPad), kBlock);
    engine.logits(block, state.queries + int64_t(v) * Engine::units(dim) * W, state.logits, first, last);
    if constexpr (Engine::kWords) {
        engine.choose_levels(block, first, last);
        for (int c = 0; c < C; ++c) softmax_words<Engine>(call, engine, state, v, c, block, first, last, masked);
        engine.accumulate(state.logits, state.worths, state.outputs + int64_t(v) * dim * W, first, last);
    } else {
        for (int c = 0; c < C; ++c) {
            float* logits = state.logits + c * kBlock * W;
            if (call.threshold) softmax_above<Engine>(call, state, v + c, logits, block, first, last, padded, masked);
            else softmax<Engine>(call, state, v + c, logits, block, first, last, padded, masked);
        }
        engine.accumulate(block, state.logits, state.outputs + int64_t(v) * dim * W, first, last);
    }
    return true;
}

template <class Engine>
void prefill_item(const foveate_attention& call, const PrefillItem& item, void* scratch) {
    using Row = typename Engine::Row;
    constexpr int C = Engine::kVectors, kBlock = Engine::kBlock;
    static_assert(kBlock <= KeyBlock<Row>::kCapacity);
    const int group = heads_per_kind(call), dim = call.head_dim;
    const int rows = item.count * group;
    PrefillState<Engine> state(scratch, call, rows);
    load_queries<Engine>(call, item, state);

    const int64_t context = call.context_lens[item.sequence];
    const int64_t begin = larger<int64_t>(0, int64_t(item.position) - call.farthest + 1);
    const int64_t end = smaller<int64_t>(context, int64_t(item.position) + item.count - call.nearest);
    const int kinds = call.num_heads / group;
    KeyCursor<Row> cursor(call, item.sequence, item.kind / (kinds / call.num_kv_heads), begin, end, false);
    if (call.indices) {
        const int64_t at = int64_t(item.row) * call.selected_heads + item.kind;
        cursor.select(call.indices + at * call.selected_width, 0, call.counts[at], call.granularity);
    }

    Engine engine(state.engine, dim);
    const int passes = state.vectors / C;
    int current = 0;
    if (begin < end) cursor.fill(state.blocks[0], kBlock);
    else state.blocks[0].count = 0;
    while (state.blocks[current].count > 0) {
        KeyBlock<Row>& block = state.blocks[current];
        KeyBlock<Row>& next = state.blocks[1 - current];
        cursor.fill(next, kBlock);
        block.load_scales();
        engine.load(block);
        const int share = (next.count + passes - 1) / passes;
        for (int pass = 0; pass < passes; ++pass) {
            prefetch_rows(next, pass * share, (pass + 1) * share, dim);
            const int v = pass * C;
            multiply<Engine>(call, engine, block, state, v);
        }
        current = 1 - current;
    }
    store_outputs<Engine>(call, item, state);
}

template <class Engine>
int64_t prefill_scratch(const foveate_attention& call, int rows) {
    int64_t bytes = 0;
    PrefillState<Engine>(nullptr, call, rows, &bytes);
    return bytes;
}

// Queries and accumulators of an item stay in L2: 48 Ki channels are 192 KiB of accumulators.
template <class Engine>
int prefill_rows(const foveate_attention& call) {
    return larger(64, 48 * 1024 / call.head_dim);
}

}  // namespace
