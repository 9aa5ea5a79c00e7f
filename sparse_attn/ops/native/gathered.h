// Prefill where each query has units of keys of its own, by FlashMoBA's order: queries are gathered per unit.
//
// An item is a run of queries of one sequence for one KV head. Its rows (queries x heads of the group) are sorted into
// a list per unit; each unit is loaded once and multiplied with its list, ``kVectors`` vectors of columns at a time, by
// the same products as in prefill.h. What a row has summed up so far stays in a float32 row of its own: columns start
// from the row's exponent reference, so that their sums and outputs are simply added to it.
#pragma once

#include "prefill.h"

namespace {

template <class Engine>
struct GatheredState {
    using T = typename Engine::T;
    static constexpr int W = Engine::Simd::W, C = Engine::kVectors;
    int32_t* ends;     // [units + 1] of the lists
    int32_t* lists;    // rows by unit, ascending
    const T** queries;  // [rows]
    int32_t* positions;  // [rows]
    float* outputs;      // [rows][dim]
    float* reference;  // [rows]
    float* sums;       // [rows]
    PrefillState<Engine> pass;

    // ``units`` may be chosen, by rows of ``queries`` queries.
    GatheredState(void* memory, const foveate_attention& call, int queries, int64_t units, int64_t* bytes = nullptr)
        : GatheredState(Arena(memory), memory, call, queries, units, bytes) {}

private:
    GatheredState(Arena arena, void* memory, const foveate_attention& call, int queries, int64_t units, int64_t* bytes)
        : ends(arena.take<int32_t>(units + 1)),
          lists(arena.take<int32_t>(rows_of(call, queries) * call.selected_width)),
          queries(arena.take<const T*>(rows_of(call, queries))),
          positions(arena.take<int32_t>(rows_of(call, queries))),
          outputs(arena.take<float>(rows_of(call, queries) * call.head_dim)),
          reference(arena.take<float>(rows_of(call, queries))),
          sums(arena.take<float>(rows_of(call, queries))),
          pass(static_cast<char*>(memory) + arena.used(memory), call, C * W, bytes) {
        if (bytes) *bytes += arena.used(memory);
    }

    static int64_t rows_of(const foveate_attention& call, int queries) {
        return int64_t(queries) * (call.num_heads / call.num_kv_heads);
    }
};

// Sorts the item's rows by the units that they chose.
template <class Engine>
void list_rows(const foveate_attention& call, const PrefillItem& item, int64_t units, GatheredState<Engine>& state) {
    const int group = call.num_heads / call.num_kv_heads, kinds = call.selected_heads;
    const int choices = kinds / call.num_kv_heads;  // rows of the selection per KV head: 1 or the group
    const int heads = group / choices;              // query heads that share one of them
    auto each = [&](auto&& take) {
        for (int query = 0; query < item.count; ++query)
            for (int choice = 0; choice < choices; ++choice) {
                const int64_t at = int64_t(item.start + query) * kinds + item.kind * choices + choice;
                const int32_t* chosen = call.indices + at * call.selected_width;
                for (int i = 0; i < call.counts[at]; ++i)
                    if (chosen[i] >= 0 && chosen[i] < units) take(chosen[i], query * group + choice * heads);
            }
    };
    int32_t* ends = state.ends;
    for (int64_t u = 0; u <= units; ++u) ends[u] = 0;
    each([&](int32_t unit, int) { ends[unit + 1] += heads; });
    for (int64_t u = 0; u < units; ++u) ends[u + 1] += ends[u];
    // ``ends[u]`` is where list u begins, and moves to its end as it is filled.
    each([&](int32_t unit, int row) {
        for (int h = 0; h < heads; ++h) state.lists[ends[unit]++] = row + h;
    });
}

template <class Engine>
void begin_rows(const foveate_attention& call, const PrefillItem& item, GatheredState<Engine>& state) {
    using T = typename Engine::T;
    const int group = call.num_heads / call.num_kv_heads;
    for (int query = 0, row = 0; query < item.count; ++query)
        for (int h = 0; h < group; ++h, ++row) {
            state.queries[row] = static_cast<const T*>(call.query) + (item.start + query) * call.query_token_stride +
                                 (int64_t(item.kind) * group + h) * call.query_head_stride;
            state.positions[row] = item.position + query;
            state.reference[row] = -kInfinity;
            state.sums[row] = 0.0f;
        }
    __builtin_memset(state.outputs, 0, size_t(item.count) * group * call.head_dim * sizeof(float));
}

// Makes some rows of a list the columns of the next pass; behind the last, it is repeated.
template <class Engine>
void load_columns(const foveate_attention& call, const int32_t* rows, int count, GatheredState<Engine>& state) {
    using Simd = typename Engine::Simd;
    using T = typename Engine::T;
    constexpr int W = Simd::W;
    const int dim = call.head_dim;
    PrefillState<Engine>& pass = state.pass;
    for (int v = 0; v < Engine::kVectors; ++v) {
        const T* source[W];
        for (int lane = 0; lane < W; ++lane) {
            const int row = rows[smaller(v * W + lane, count - 1)];
            source[lane] = state.queries[row];
            pass.high[v * W + lane] = state.positions[row] - call.nearest;
            pass.low[v * W + lane] = state.positions[row] - call.farthest;
            pass.reference[v * W + lane] = state.reference[row];
        }
        Engine::pack(source, dim, pass.queries + int64_t(v) * Engine::units(dim) * W);
        Simd::store(pass.sums + v * W, Simd::zero());
        float* output = pass.outputs + int64_t(v) * dim * W;
        for (int d = 0; d < dim; ++d) Simd::store(output + d * W, Simd::zero());
    }
}

// Adds what the columns have summed up to their rows.
template <class Engine>
void add_columns(const foveate_attention& call, const int32_t* rows, int count, GatheredState<Engine>& state) {
    using Simd = typename Engine::Simd;
    using F = typename Simd::F;
    constexpr int W = Simd::W;
    const int dim = call.head_dim;
    const float unit = call.softcap != 0.0f ? 1.0f : call.scale;
    const PrefillState<Engine>& pass = state.pass;
    for (int v = 0; v * W < count; ++v) {
        const int lanes = smaller(W, count - v * W);
        float* target[W];
        for (int lane = 0; lane < lanes; ++lane) {
            const int row = rows[v * W + lane];
            target[lane] = state.outputs + int64_t(row) * dim;
            const float moved = pass.reference[v * W + lane];
            if (moved > state.reference[row]) {  // rare: see kSlack
                const float shrink = std::exp((state.reference[row] - moved) * unit);
                for (int d = 0; d < dim; d += W)
                    Simd::store(target[lane] + d, Simd::mul(Simd::load(target[lane] + d), Simd::set(shrink)));
                state.sums[row] *= shrink;
                state.reference[row] = moved;
            }
            state.sums[row] += pass.sums[v * W + lane];
        }
        const float* output = pass.outputs + int64_t(v) * dim * W;
        for (int d = 0; d < dim; d += W) {
            F tile[W];
            for (int i = 0; i < W; ++i) tile[i] = Simd::load(output + (d + i) * W);
            Simd::transpose(tile);
            for (int lane = 0; lane < lanes; ++lane)
                Simd::store(target[lane] + d, Simd::add(Simd::load(target[lane] + d), tile[lane]));
        }
    }
}

// Divides the rows by their sums, and writes out and log-sum-exp.
template <class Engine>
void store_rows(const foveate_attention& call, const PrefillItem& item, const GatheredState<Engine>& state) {
    using Simd = typename Engine::Simd;
    using T = typename Engine::T;
    const int group = call.num_heads / call.num_kv_heads, dim = call.head_dim;
    const float scale = call.softcap != 0.0f ? 1.0f : call.scale;
    for (int row = 0; row < item.count * group; ++row) {
        const int head = item.kind * group + row % group;
        const int64_t place = int64_t(item.start + row / group) * call.num_heads + head;
        const float sum = state.sums[row];
        const float lse = sum != 0.0f ? state.reference[row] * scale + std::log(sum) : -kInfinity;
        call.lse[place] = lse;
        float share = sum != 0.0f ? 1.0f / sum : 0.0f;
        if (call.sinks && sum != 0.0f) share /= 1.0f + std::exp(call.sinks[head] - lse);
        const float* output = state.outputs + int64_t(row) * dim;
        T* target = static_cast<T*>(call.out) + place * dim;
        for (int d = 0; d < dim; d += Simd::W)
            Simd::store(target + d, Simd::mul(Simd::load(output + d), Simd::set(share)));
    }
}

template <class Engine>
void gathered_item(const foveate_attention& call, const PrefillItem& item, void* scratch) {
    using Row = typename Engine::Row;
    constexpr int kColumns = Engine::kVectors * Engine::Simd::W;
    // Units behind the item's last query are seen by none of its rows.
    const int64_t end = smaller<int64_t>(call.context_lens[item.sequence], int64_t(item.position) + item.count);
    const int64_t begin = larger<int64_t>(0, int64_t(item.position) - call.farthest + 1);
    const int64_t units = units_of(call, end);
    GatheredState<Engine> state(scratch, call, item.count, units);
    list_rows<Engine>(call, item, units, state);
    begin_rows<Engine>(call, item, state);
    Engine engine(state.pass.engine, call.head_dim);
    KeyBlock<Row>& block = state.pass.blocks[0];
    for (int64_t unit = 0; unit < units; ++unit) {
        const int first = unit ? state.ends[unit - 1] : 0, last = state.ends[unit];
        if (first == last) continue;
        KeyCursor<Row> cursor(call, item.sequence, item.kind, begin, end - call.nearest, false);
        const int32_t chosen = int32_t(unit);
        cursor.select(&chosen, 0, 1, call.granularity);
        for (cursor.fill(block, Engine::kBlock); block.count > 0; cursor.fill(block, Engine::kBlock)) {
            block.load_scales();
            engine.load(block);
            for (int at = first; at < last; at += kColumns) {
                const int count = smaller(kColumns, last - at);
                load_columns<Engine>(call, state.lists + at, count, state);
                if (multiply<Engine>(call, engine, block, state.pass, 0))
                    add_columns<Engine>(call, state.lists + at, count, state);
            }
        }
    }
    store_rows<Engine>(call, item, state);
}

// Rows of an item: the more there are, the fuller the lists; their outputs and queries should stay in L2.
template <class Engine>
int gathered_rows(const foveate_attention& call) {
    return larger(256, 128 * 1024 / call.head_dim);
}

template <class Engine>
int64_t gathered_scratch(const foveate_attention& call, int queries, int64_t units) {
    int64_t bytes = 0;
    GatheredState<Engine>(nullptr, call, queries, units, &bytes);
    return bytes;
}

}  // namespace
