// Products with weights in bfloat16, in the lanes of one instruction set.
#pragma once

#include "narrow.h"
#include "simd.h"

namespace {

template <class Vec>
struct Narrow {
    using F = typename Vec::F;
    static constexpr int W = Vec::W;
    static constexpr int V = kNarrowPanel / W;  // vectors of a panel
    // Rows and panels at once: as many sums as there are registers for beside a panel and an input.
    static constexpr int kRows = W == 16 ? 12 : 6, kPanels = W == 16 ? 2 : 1;
    // Input channels of a panel, 1 KiB, that are fetched before they are needed: one core read at 0.85 of what a `sum`
    // does, where it was 0.75 without, and 0.73 with 4 KiB.
    static constexpr int64_t kAhead = 32;
    static constexpr int64_t kRun = 512;  // products summed in a row: longer sums lose digits, and leave L1

    static FOVEATE_INLINE const bfloat16* panel_of(const foveate_narrow& call, int64_t panel) {
        return static_cast<const bfloat16*>(call.weight) + panel * call.in_channels * kNarrowPanel;
    }

    // The first part of a sum comes with bias and residual, later ones are added to what is there.
    static FOVEATE_INLINE void put(const foveate_narrow& call, int64_t row, int64_t channel, F value, bool first) {
        const int64_t left = call.out_channels - channel;
        if (left <= 0) return;
        float* out = call.out + row * call.out_channels + channel;
        const float* other = first ? nullptr : out;
        if (first && call.bias) value = Vec::add(value, Vec::load(call.bias + channel));
        if (first && call.residual) other = call.residual + row * call.residual_stride + channel;
        if (left >= W) {
            Vec::store(out, other ? Vec::add(value, Vec::load(other)) : value);
            return;
        }
        float whole[W];
        Vec::store(whole, value);
        for (int64_t i = 0; i < left; ++i) out[i] = whole[i] + (other ? other[i] : 0.0f);
    }

    // One row, which waits for memory: a panel from end to end, in sums enough that no product waits for another.
    static void one(const foveate_narrow& call, int64_t row, int64_t panel) {
        constexpr int kSums = 8 / V;
        const float* x = call.input + row * call.input_stride;
        const bfloat16* w = panel_of(call, panel);
        F sums[kSums][V];
#pragma GCC unroll 8
        for (int s = 0; s < kSums; ++s)
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) sums[s][v] = Vec::zero();
        const int64_t depth = call.in_channels;
        int64_t k = 0;
        for (; k + kSums <= depth; k += kSums) {
#pragma GCC unroll 8
            for (int s = 0; s < kSums; s += 2)  // 64 bytes; panels follow one another
                _mm_prefetch(reinterpret_cast<const char*>(w + (k + s + kAhead) * kNarrowPanel), _MM_HINT_T0);
#pragma GCC unroll 8
            for (int s = 0; s < kSums; ++s)
#pragma GCC unroll 8
                for (int v = 0; v < V; ++v)
                    sums[s][v] = Vec::fma(Vec::set(x[k + s]), Vec::load(w + (k + s) * kNarrowPanel + v * W), sums[s][v]);
        }
        for (; k < depth; ++k)
            for (int v = 0; v < V; ++v)
                sums[0][v] = Vec::fma(Vec::set(x[k]), Vec::load(w + k * kNarrowPanel + v * W), sums[0][v]);
        for (int v = 0; v < V; ++v) {
#pragma GCC unroll 8
            for (int s = 1; s < kSums; ++s) sums[0][v] = Vec::add(sums[0][v], sums[s][v]);
            put(call, row, panel * kNarrowPanel + v * W, sums[0][v], true);
        }
    }

    // M rows, P panels and input channels from..to: each weight is widened once for all of these rows.
    template <int M, int P>
    static void several(const foveate_narrow& call, int64_t row, int64_t panel, int64_t from, int64_t to) {
        const int64_t depth = call.in_channels, stride = call.input_stride;
        const float* x = call.input + row * stride;
        const bfloat16* w = panel_of(call, panel);
        F sums[M][P * V];
#pragma GCC unroll 16
        for (int r = 0; r < M; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < P * V; ++v) sums[r][v] = Vec::zero();
        for (int64_t k = from; k < to; ++k) {
            F weights[P * V];
#pragma GCC unroll 8
            for (int v = 0; v < P * V; ++v)
                weights[v] = Vec::load(w + (v / V * depth + k) * kNarrowPanel + v % V * W);
#pragma GCC unroll 16
            for (int r = 0; r < M; ++r) {
                const F input = Vec::set(x[r * stride + k]);
#pragma GCC unroll 8
                for (int v = 0; v < P * V; ++v) sums[r][v] = Vec::fma(input, weights[v], sums[r][v]);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < M; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < P * V; ++v) put(call, row + r, panel * kNarrowPanel + v * W, sums[r][v], from == 0);
    }

    template <int M, int P>
    static void panels(const foveate_narrow& call, int64_t row, int64_t panel, int64_t last, int64_t from, int64_t to) {
        for (; panel + P <= last; panel += P) several<M, P>(call, row, panel, from, to);
        for (; panel < last; ++panel) several<M, 1>(call, row, panel, from, to);
    }

    static void block(const foveate_narrow& call, int64_t row, int64_t last_row, int64_t panel, int64_t last) {
        if (last_row == row + 1 || call.in_channels == 0) {
            for (; row < last_row; ++row)
                for (int64_t p = panel; p < last; ++p) one(call, row, p);
            return;
        }
        // These rows and panels of so many input channels lie in L1 and L2.
        for (int64_t from = 0; from < call.in_channels; from += kRun) {
            const int64_t to = smaller<int64_t>(from + kRun, call.in_channels);
            int64_t r = row;
            for (; r + kRows <= last_row; r += kRows) panels<kRows, kPanels>(call, r, panel, last, from, to);
            for (; r + 4 <= last_row; r += 4) panels<4, kPanels>(call, r, panel, last, from, to);
            switch (last_row - r) {
                case 3: panels<3, 2>(call, r, panel, last, from, to); break;
                case 2: panels<2, 2>(call, r, panel, last, from, to); break;
                case 1: panels<1, 4>(call, r, panel, last, from, to); break;
                default: break;
            }
        }
    }
};

}  // namespace
