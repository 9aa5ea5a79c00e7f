// Sums of runs of keys and bounds of pages in the lanes of one instruction set.
#pragma once

#include "scan.h"
#include "simd.h"

namespace {

constexpr int kMostChannels = 512;
constexpr int kSummed = 16;  // keys of a sum in ``foveate_scan::sums``

// Adds ``count`` rows to ``kVectors`` vectors of ``sum``.
template <class Vec, int kVectors, class Row>
FOVEATE_INLINE void add_columns(float* sum, const Row* row, const float* scales, int64_t count, int dim) {
    typename Vec::F kept[kVectors];
    for (int v = 0; v < kVectors; ++v) kept[v] = Vec::load(sum + v * Vec::W);
    for (int64_t i = 0; i < count; ++i, row += dim) {
        const typename Vec::F scale = Vec::set(scales ? scales[i] : 1.0f);
        for (int v = 0; v < kVectors; ++v) {
            const typename Vec::F x = Vec::load(row + v * Vec::W);
            kept[v] = Vec::add(kept[v], scales ? Vec::mul(x, scale) : x);
        }
    }
    for (int v = 0; v < kVectors; ++v) Vec::store(sum + v * Vec::W, kept[v]);
}

// Whole rows at a time where they fit into registers, so that memory is read in order.
template <class Vec, class Row>
void add_rows(float* sum, const Row* row, const float* scales, int64_t count, int dim) {
    constexpr int W = Vec::W;
    int d = 0;
    for (; d + 8 * W <= dim; d += 8 * W) add_columns<Vec, 8>(sum + d, row + d, scales, count, dim);
    for (; d < dim; d += W) add_columns<Vec, 1>(sum + d, row + d, scales, count, dim);
}

template <class Vec, class T>
struct Scan {
    static constexpr int W = Vec::W;
    using F = typename Vec::F;

    // Where each 16 keys are summed up already, what a run holds whole is read from there.
    static void sums(const foveate_scan& call, int sequence, int64_t run) {
        const int dim = call.head_dim, heads = call.num_kv_heads, size = call.page_size;
        const int64_t at = int64_t(sequence) * call.runs + run;
        const int32_t* table = call.block_tables + sequence * call.table_stride;
        float* out = call.out + at * heads * dim;
        for (int i = 0; i < heads * dim; ++i) out[i] = 0.0f;
        int64_t position = call.start[at], left = call.length[at];
        while (left > 0) {
            const int64_t offset = position % size, room = size - offset;
            int64_t take = left < room ? left : room;
            const bool summed = call.sums && offset % kSummed == 0 && take >= kSummed;
            if (summed) take -= take % kSummed;
            else if (call.sums && take > kSummed - offset % kSummed) take = kSummed - offset % kSummed;
            for (int head = 0; head < heads; ++head) {
                const int64_t row = (int64_t(table[position / size]) * heads + head) * size + offset;
                if (summed)
                    add_rows<Vec>(out + head * dim, call.sums + row / kSummed * dim, nullptr, take / kSummed, dim);
                else if (call.key_scales)
                    add_rows<Vec>(out + head * dim, static_cast<const int8_t*>(call.keys) + row * dim,
                                  call.key_scales + row, take, dim);
                else
                    add_rows<Vec>(out + head * dim, static_cast<const T*>(call.keys) + row * dim, nullptr, take, dim);
            }
            position += take;
            left -= take;
        }
    }

    static void bounds(const foveate_scan& call, int sequence, int kv_head, int64_t first, int64_t last) {
        const int dim = call.head_dim, group = call.num_heads / call.num_kv_heads;
        const int32_t* table = call.block_tables + sequence * call.table_stride;
        for (int h = 0; h < group; ++h) {
            const int head = kv_head * group + h;
            alignas(64) float asked[kMostChannels];
            const T* query = static_cast<const T*>(call.query) + sequence * call.query_token_stride +
                             head * call.query_head_stride;
            for (int d = 0; d < dim; d += W) Vec::store(asked + d, Vec::load(query + d));
            float* out = call.out + (int64_t(sequence) * call.num_heads + head) * call.pages;
            for (int64_t page = first; page < last; ++page) {
                if (page * call.page_size >= call.context_lens[sequence]) {
                    out[page] = -kInfinity;
                    continue;
                }
                const int64_t at = (int64_t(table[page]) * call.num_kv_heads + kv_head) * dim;
                F sum = Vec::zero();
                for (int d = 0; d < dim; d += W) {
                    const F q = Vec::load(asked + d);
                    sum = Vec::add(sum, Vec::max(Vec::mul(q, Vec::load(call.low + at + d)),
                                                 Vec::mul(q, Vec::load(call.high + at + d))));
                }
                out[page] = Vec::sum(sum);
            }
        }
    }

    static constexpr ScanKernels kernels() { return {sums, bounds}; }
};

}  // namespace
