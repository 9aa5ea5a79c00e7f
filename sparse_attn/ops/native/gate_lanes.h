// MoBA's gate in float32: block means against columns of queries, then the best blocks of each column.
//
// Gates lie as logits do in prefill.h, blocks down and queries across. So the highest gates of W queries are kept as k
// sorted vectors, and one more gate is sorted in by maxima and minima alone; the last of them is what a gate must reach.
#pragma once

#include "fma_engine.h"
#include "gate.h"

namespace {

template <class S, class T>
struct Gate {
    using F = typename S::F;
    static constexpr int W = S::W;
    static constexpr int kRows = W == 16 ? 8 : 4;
    static constexpr int kVectors = 3;
    static constexpr int kColumns = kVectors * W;

    float* queries;  // [kVectors][dim][W]
    float* gates;    // [kVectors][room][W]
    float* best;     // [top_k - 1][W]
    int64_t room;    // blocks, rounded up to what a product writes

    Gate(void* memory, const foveate_gate& call, int64_t* bytes = nullptr) {
        Arena arena(memory);
        room = call.blocks + kRows;
        queries = arena.take<float>(int64_t(kColumns) * call.head_dim);
        gates = arena.take<float>(kColumns * room);
        best = arena.take<float>(call.top_k * W);
        if (bytes) *bytes = arena.used(memory);
    }

    // Columns of ``count`` queries; behind the last, it is repeated. Heads that choose together are summed up: so are
    // their gates then.
    void load(const foveate_gate& call, int64_t first_query, int count, int kind) {
        const int fold = call.num_heads / call.kinds;
        for (int v = 0; v < kVectors; ++v)
            for (int d = 0; d < call.head_dim; d += W) {
                F tile[W];
                for (int lane = 0; lane < W; ++lane) {
                    const T* row = static_cast<const T*>(call.query) + d +
                                   (first_query + smaller(v * W + lane, count - 1)) * call.query_token_stride +
                                   int64_t(kind) * fold * call.query_head_stride;
                    tile[lane] = S::load(row);
                    for (int h = 1; h < fold; ++h) tile[lane] = S::add(tile[lane], S::load(row + h * call.query_head_stride));
                }
                S::transpose(tile);
                float* target = queries + (int64_t(v) * call.head_dim + d) * W;
                for (int i = 0; i < W; ++i) S::store(target + i * W, tile[i]);
            }
    }

    // Gates of blocks [first, last), from row 0 on.
    void multiply(const foveate_gate& call, int kind, int64_t first, int64_t last) {
        const int64_t dim = call.head_dim;
        const float* means = call.means + (int64_t(kind) / (call.kinds / call.num_kv_heads) * call.blocks + first) * dim;
        for (int64_t u = 0; u < last - first; u += kRows) {
            const float* rows[kRows];
            for (int r = 0; r < kRows; ++r) rows[r] = means + smaller<int64_t>(u + r, last - first - 1) * dim;
            product<FloatMac<S>, kRows, kVectors, false>(rows, 1, queries, W, dim * W, int(dim), gates + u * W, W,
                                                         room * W);
        }
    }

    // The gate that a block must reach to be among the best ``k`` of its column. What may not be chosen becomes -inf.
    F least(float* gates, const int32_t* low, const int32_t* high, int64_t first, int64_t last, int64_t k) {
        const typename S::I before = S::load_int(low), to = S::load_int(high);
        for (int64_t j = 0; j < k; ++j) S::store(best + j * W, S::set(-kInfinity));
        float* worst = best + (k - 1) * W;
        for (int64_t u = 0; u < last - first; ++u) {
            F gate = S::visible(S::load(gates + u * W), S::set_int(int32_t(first + u)), to, before);
            S::store(gates + u * W, gate);
            if (!S::any_above(gate, S::load(worst))) continue;
            for (int64_t j = 0; j < k; ++j) {
                const F kept = S::load(best + j * W);
                S::store(best + j * W, S::max(kept, gate));
                gate = S::min(kept, gate);
            }
        }
        return S::max(S::load(worst), S::set(-3.402823466e38f));
    }

    // Of one column with more than ``k`` gates that reach ``least``: all above it, and the last of those that equal it.
    static void settle(const float* gates, float least, int64_t first, int64_t last, int64_t k, int32_t* chosen) {
        int64_t above = 0, equal = 0;
        for (int64_t u = 0; u < last - first; ++u) {
            above += gates[u * W] > least;
            equal += gates[u * W] == least;
        }
        int64_t passed = equal - (k - above), count = 0;
        // Never more than fit: a NaN among the gates may have lowered ``least``.
        for (int64_t u = 0; u < last - first && count < k; ++u) {
            if (!(gates[u * W] >= least) || (gates[u * W] == least && passed-- > 0)) continue;
            chosen[count++] = int32_t(first + u);
        }
    }

    static void choose(const foveate_gate& call, int64_t first_query, int kind, void* scratch) {
        Gate state(scratch, call);
        const int count = int(smaller<int64_t>(kColumns, call.queries - first_query));
        const int64_t k = call.top_k - 1;
        alignas(64) int32_t low[kColumns], high[kColumns];
        int64_t first = call.blocks, last = 0;
        for (int c = 0; c < kColumns; ++c) {
            const int64_t query = first_query + smaller(c, count - 1);
            low[c] = call.first[query] - 1;
            high[c] = call.end[query] - 1;
            first = smaller<int64_t>(first, call.first[query]);
            last = larger<int64_t>(last, call.end[query]);
        }
        last = k ? smaller(last, call.blocks) : 0;
        if (first < last) {
            state.load(call, first_query, count, kind);
            state.multiply(call, kind, first, last);
        }
        for (int v = 0; v * W < count; ++v) {
            const int lanes = smaller(W, count - v * W);
            int64_t found[W] = {};
            int32_t* rows[W];
            for (int lane = 0; lane < lanes; ++lane)
                rows[lane] = call.indices + ((first_query + v * W + lane) * call.kinds + kind) * call.top_k;
            if (first < last) {
                float* gates = state.gates + v * state.room * W;
                const F bar = state.least(gates, low + v * W, high + v * W, first, last, k);
                for (int64_t u = 0; u < last - first; ++u)
                    for (uint32_t lane_bits = S::at_least(S::load(gates + u * W), bar) & ((1u << lanes) - 1); lane_bits;
                         lane_bits &= lane_bits - 1) {
                        const int lane = __builtin_ctz(lane_bits);
                        if (found[lane] < k) rows[lane][found[lane]] = int32_t(first + u);
                        ++found[lane];
                    }
                alignas(64) float bars[W];
                S::store(bars, bar);
                for (int lane = 0; lane < lanes; ++lane)
                    if (found[lane] > k) {
                        settle(gates + lane, bars[lane], first, last, k, rows[lane]);
                        found[lane] = k;
                    }
            }
            for (int lane = 0; lane < lanes; ++lane) {
                const int64_t query = first_query + v * W + lane;
                rows[lane][found[lane]] = int32_t((call.position + query) / call.block_tokens);
                for (int64_t i = found[lane] + 1; i < call.top_k; ++i) rows[lane][i] = -1;
                call.counts[query * call.kinds + kind] = int32_t(found[lane] + 1);
            }
        }
    }

    static int64_t scratch(const foveate_gate& call) {
        int64_t bytes = 0;
        Gate(nullptr, call, &bytes);
        return bytes;
    }

    static constexpr GateKernels kernels() { return {kColumns, scratch, choose}; }
};

}  // namespace
