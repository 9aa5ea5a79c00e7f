// Both products of decode on AMX tiles, for up to 16 heads of a group at once: rows of a tile that no head fills cost
// nothing that matters, as one tile instruction takes as long as four dot products of one head.
//
// Logits: A = 16 keys x 32 channels where they lie, B = pairs of channels of the heads, C = keys x heads, turned into
// a row per head by 16-byte loads. Values: A = heads x 32 keys of weights, B = V with two keys interleaved. The
// interleaving leaves the channels of each 32 in another order, which the last step undoes.
#pragma once

#include "decode.h"
#include "tiles.h"

namespace {

// Four neighbouring columns of a tile of 16 x 16 floats become rows.
FOVEATE_INLINE void four_columns(const float* tile, __m512 (&rows)[4]) {
    __m512 column[4];
    for (int j = 0; j < 4; ++j) {  // in lane block L stands row 4L + j
        __m512 v = _mm512_castps128_ps512(_mm_load_ps(tile + j * 16));
        v = _mm512_mask_broadcast_f32x4(v, 0x00f0, _mm_load_ps(tile + (4 + j) * 16));
        v = _mm512_mask_broadcast_f32x4(v, 0x0f00, _mm_load_ps(tile + (8 + j) * 16));
        column[j] = _mm512_mask_broadcast_f32x4(v, 0xf000, _mm_load_ps(tile + (12 + j) * 16));
    }
    const __m512 a = _mm512_unpacklo_ps(column[0], column[1]), b = _mm512_unpackhi_ps(column[0], column[1]);
    const __m512 c = _mm512_unpacklo_ps(column[2], column[3]), d = _mm512_unpackhi_ps(column[2], column[3]);
    rows[0] = _mm512_shuffle_ps(a, c, 0x44);
    rows[1] = _mm512_shuffle_ps(a, c, 0xee);
    rows[2] = _mm512_shuffle_ps(b, d, 0x44);
    rows[3] = _mm512_shuffle_ps(b, d, 0xee);
}

// Sixteen key rows side by side: where they lie, or a copy at their place in ``copies``, with zeros behind the last key.
template <class Row>
const Row* tile_of(const KeyBlock<Row>& block, int at, int dim, Row* copies) {
    const int held = larger(0, smaller(16, block.count - at));
    bool side_by_side = held == 16;
    for (int i = 1; side_by_side && i < 16; ++i) side_by_side = block.keys[at + i] == block.keys[at] + int64_t(i) * dim;
    if (side_by_side) return block.keys[at];
    const size_t bytes = size_t(dim) * sizeof(Row);
    Row* copy = copies + int64_t(at) * dim;
    for (int i = 0; i < held; ++i) __builtin_memcpy(copy + int64_t(i) * dim, block.keys[at + i], bytes);
    __builtin_memset(copy + int64_t(held) * dim, 0, size_t(16 - held) * bytes);
    return copy;
}

class TileProducts {
public:
    using Simd = Vec16;
    using T = bfloat16;
    using Row = bfloat16;

    static bool fits(const foveate_attention& call) { return call.head_dim % 32 == 0 && heads_per_kind(call) <= 16; }

    TileProducts(Arena& arena, const foveate_attention& call) : dim_(call.head_dim), group_(heads_per_kind(call)) {
        queries_ = arena.take<float>(int64_t(dim_ / 2) * 16);
        gathered_ = arena.take<T>(int64_t(kDecodeBlock) * dim_);
        logits_ = arena.take<float>(64 * 16);
        weights_ = arena.take<T>(16 * kDecodeBlock);
        pairs_ = arena.take<float>(int64_t(kDecodeBlock / 2) * dim_);
        outputs_ = arena.take<float>(int64_t(16) * dim_);
        ordered_ = arena.take<float>(int64_t(group_) * dim_);
    }

    void start(const T* query, int64_t head_stride) {
        for (int d = 0; d < dim_; d += 32) {
            __m512 tile[16];
            for (int h = 0; h < 16; ++h)
                tile[h] = h < group_ ? _mm512_loadu_ps(query + h * head_stride + d) : _mm512_setzero_ps();
            Vec16::transpose(tile);
            for (int i = 0; i < 16; ++i) _mm512_store_ps(queries_ + (d / 2 + i) * 16, tile[i]);
        }
        __builtin_memset(weights_, 0, sizeof(T) * 16 * kDecodeBlock);
        __builtin_memset(outputs_, 0, sizeof(float) * 16 * size_t(dim_));
    }

    void logits(const KeyBlock<T>& block, Ahead<T>& ahead, float* weights) {
        for (int at = 0; at < block.count; at += 64) {
            const T* keys[4];
            for (int i = 0; i < 4; ++i) keys[i] = tile_of(block, at + 16 * i, dim_, gathered_);
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            const int64_t stride = dim_ * 2;
            for (int d = 0; d < dim_; d += 32) {
                _tile_loadd(6, queries_ + d / 2 * 16, 64);
                _tile_loadd(4, keys[0] + d, stride);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(5, keys[1] + d, stride);
                _tile_dpbf16ps(1, 5, 6);
                _tile_loadd(4, keys[2] + d, stride);
                _tile_dpbf16ps(2, 4, 6);
                _tile_loadd(5, keys[3] + d, stride);
                _tile_dpbf16ps(3, 5, 6);
                ahead.advance(4);
            }
            _tile_stored(0, logits_, 64);
            _tile_stored(1, logits_ + 256, 64);
            _tile_stored(2, logits_ + 512, 64);
            _tile_stored(3, logits_ + 768, 64);
            for (int i = 0; i < 64 && at + i < block.count; i += 16) {
                ahead.advance(8);
                for (int head = 0; head < group_; head += 4) heads_of(logits_ + i * 16 + head, head, weights + at + i);
            }
        }
    }

    void shrink(int head, float factor) {
        float* output = outputs_ + int64_t(head) * dim_;
        for (int d = 0; d < dim_; d += 16)
            _mm512_store_ps(output + d, _mm512_mul_ps(_mm512_load_ps(output + d), _mm512_set1_ps(factor)));
    }

    void accumulate(const KeyBlock<T>& block, Ahead<T>& ahead, const float* weights) {
        const int padded = round_up(block.count, 32);
        for (int h = 0; h < group_; ++h)
            for (int k = 0; k < padded; k += 32) {
                const float* row = weights + h * kDecodeBlock + k;
                // The second half of the last tile may lie behind what the softmax wrote.
                const __m512 high = k + 16 < block.count ? _mm512_load_ps(row + 16) : _mm512_setzero_ps();
                _mm512_store_si512(weights_ + h * kDecodeBlock + k,
                                   (__m512i)_mm512_cvtne2ps_pbh(high, _mm512_load_ps(row)));
            }
        for (int k = 0; k < padded; k += 2) {
            const T* zero = reinterpret_cast<const T*>(kZeroRow);
            const T* even = k < block.count ? block.values[k] : zero;
            const T* odd = k + 1 < block.count ? block.values[k + 1] : zero;
            ahead.advance(2);
            float* pair = pairs_ + int64_t(k / 2) * dim_;
            for (int d = 0; d < dim_; d += 32) {
                const __m512i a = _mm512_loadu_si512(even + d), b = _mm512_loadu_si512(odd + d);
                _mm512_store_si512(pair + d, _mm512_unpacklo_epi16(a, b));
                _mm512_store_si512(pair + d + 16, _mm512_unpackhi_epi16(a, b));
            }
        }
        const int64_t stride = dim_ * 4;
        for (int d = 0; d < dim_; d += 32) {
            _tile_loadd(0, outputs_ + d, stride);
            _tile_loadd(1, outputs_ + d + 16, stride);
            for (int k = 0; k < padded; k += 32) {
                const float* pair = pairs_ + int64_t(k / 2) * dim_ + d;
                _tile_loadd(4, weights_ + k, kDecodeBlock * 2);
                _tile_loadd(6, pair, stride);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, pair + 16, stride);
                _tile_dpbf16ps(1, 4, 7);
                ahead.advance(8);
            }
            _tile_stored(0, outputs_ + d, stride);
            _tile_stored(1, outputs_ + d + 16, stride);
        }
    }

    const float* finish() {
        // Of 32 channels the low interleaving took 0..3, 8..11, 16..19, 24..27, and the high one the others.
        const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        for (int h = 0; h < group_; ++h)
            for (int d = 0; d < dim_; d += 32) {
                const float* source = outputs_ + int64_t(h) * dim_ + d;
                float* target = ordered_ + int64_t(h) * dim_ + d;
                const __m512 low = _mm512_load_ps(source), high = _mm512_load_ps(source + 16);
                _mm512_store_ps(target, _mm512_permutex2var_ps(low, first, high));
                _mm512_store_ps(target + 16, _mm512_permutex2var_ps(low, second, high));
            }
        return ordered_;
    }

private:
    // Columns of four heads in a tile of 16 keys x 16 heads become rows: weights[head + h][0..15].
    void heads_of(const float* tile, int head, float* weights) {
        __m512 rows[4];
        four_columns(tile, rows);
        for (int h = 0; h < smaller(4, group_ - head); ++h) _mm512_store_ps(weights + (head + h) * kDecodeBlock, rows[h]);
    }

    const int dim_, group_;
    float* queries_;   // [D / 2][16 heads] pairs of channels
    T* gathered_;      // [kDecodeBlock][D]
    float* logits_;    // [64 keys][16 heads]
    T* weights_;       // [16 heads][kDecodeBlock]
    float* pairs_;     // [kDecodeBlock / 2][D] pairs of keys
    float* outputs_;   // [16 heads][D]
    float* ordered_;   // [group][D]
};

// Dot products do what tiles do not fit.
using DotProducts = VectorProducts<DotRows>;

void decode_item_on_tiles(const foveate_attention& call, const DecodeItem& item, float* partial, void* scratch) {
    if (TileProducts::fits(call)) decode_item<TileProducts>(call, item, partial, scratch);
    else decode_item<DotProducts>(call, item, partial, scratch);
}

int64_t decode_scratch_on_tiles(const foveate_attention& call) {
    return larger(decode_scratch<TileProducts>(call), decode_scratch<DotProducts>(call));
}

}  // namespace
