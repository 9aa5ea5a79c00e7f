// Both products of decode over int8 pages on AMX tiles of bytes, for up to 8 heads of a group at once. K is multiplied
// where it lies, and V needs no more than interleaving: nothing is widened.
//
// The other factor, a query or a head's weights of a block, becomes two planes of bytes, high * 128 + low, in units of
// its largest element / 16256: off by 3e-5 of that at most, where bfloat16 would be off by 2e-3 of each. A tile has 16
// rows or columns, one per plane and head.
//
// Logits: A = 16 keys x 64 channels where they lie, B = planes of the queries, C = keys x planes. Values: A = planes of
// the weights x 64 keys, B = V with four keys interleaved. The interleaving leaves the channels of each 64 in another
// order, which the last step undoes.
#pragma once

#include "decode_tiles.h"

namespace {

class ByteTileProducts {
public:
    using Simd = Vec16;
    using T = bfloat16;
    using Row = int8_t;

    static bool fits(const foveate_attention& call) { return call.head_dim % 64 == 0 && heads_per_kind(call) <= kHeads; }

    ByteTileProducts(Arena& arena, const foveate_attention& call) : dim_(call.head_dim), group_(heads_per_kind(call)) {
        planes_ = arena.take<int8_t>(int64_t(16) * dim_);
        queries_ = arena.take<int8_t>(int64_t(16) * dim_);
        gathered_ = arena.take<int8_t>(int64_t(kDecodeBlock) * dim_);
        sums_ = arena.take<int32_t>(4 * 256);
        weights_ = arena.take<int8_t>(16 * kDecodeBlock);
        fours_ = arena.take<int8_t>(int64_t(kDecodeBlock) * dim_);
        outputs_ = arena.take<float>(int64_t(group_) * dim_);
    }

    void start(const T* query, int64_t head_stride) {
        __builtin_memset(planes_, 0, size_t(16) * dim_);
        for (int h = 0; h < group_; ++h) {
            const T* row = query + h * head_stride;
            __m512 top = _mm512_setzero_ps(), odd = top;
            for (int d = 0; d < dim_; d += 16) {
                const __m512 x = Simd::load(row + d);
                top = _mm512_max_ps(top, _mm512_abs_ps(x));
                odd = _mm512_fmadd_ps(x, _mm512_setzero_ps(), odd);  // NaN where x is no finite number
            }
            units_[h] = _mm512_reduce_max_ps(top) / kSteps;
            const __m512 steps = _mm512_set1_ps(steps_of(units_[h]));
            for (int d = 0; d < dim_; d += 16)
                split(_mm512_mul_ps(Simd::load(row + d), steps), planes_ + h * dim_ + d, planes_ + (h + kHeads) * dim_ + d);
            if (!(_mm512_reduce_add_ps(odd) == 0.0f)) units_[h] = __builtin_nanf("");
        }
        __builtin_memset(weights_, 0, 16 * kDecodeBlock);
        for (int d = 0; d < dim_; d += 64) {
            __m512 tile[16];
            for (int i = 0; i < 16; ++i) tile[i] = _mm512_loadu_ps(planes_ + i * dim_ + d);
            Simd::transpose(tile);
            for (int i = 0; i < 16; ++i) _mm512_store_ps(queries_ + (d / 4 + i) * 64, tile[i]);
        }
        for (int i = 0; i < group_ * dim_; ++i) outputs_[i] = 0.0f;
    }

    void logits(const KeyBlock<Row>& block, Ahead<Row>& ahead, float* weights) {
        for (int at = 0; at < block.count; at += 64) {
            const Row* keys[4];
            for (int i = 0; i < 4; ++i) keys[i] = tile_of(block, at + 16 * i, dim_, gathered_);
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int d = 0; d < dim_; d += 64) {
                _tile_loadd(6, queries_ + d * 16, 64);
                _tile_loadd(4, keys[0] + d, dim_);
                _tile_dpbssd(0, 4, 6);
                _tile_loadd(5, keys[1] + d, dim_);
                _tile_dpbssd(1, 5, 6);
                _tile_loadd(4, keys[2] + d, dim_);
                _tile_dpbssd(2, 4, 6);
                _tile_loadd(5, keys[3] + d, dim_);
                _tile_dpbssd(3, 5, 6);
                ahead.advance(8);
            }
            _tile_stored(0, sums_, 64);
            _tile_stored(1, sums_ + 256, 64);
            _tile_stored(2, sums_ + 512, 64);
            _tile_stored(3, sums_ + 768, 64);
            for (int i = 0; i < 64 && at + i < block.count; i += 16) {
                ahead.advance(8);
                for (int head = 0; head < group_; head += 4) {
                    __m512i high[4], low[4];
                    columns(sums_ + i * 16 + head, high);
                    columns(sums_ + i * 16 + kHeads + head, low);
                    for (int h = 0; h < 4 && head + h < group_; ++h)
                        _mm512_store_ps(weights + (head + h) * kDecodeBlock + at + i, joined(high[h], low[h], units_[head + h]));
                }
            }
        }
    }

    void shrink(int head, float factor) {
        float* output = outputs_ + int64_t(head) * dim_;
        for (int d = 0; d < dim_; d += 16)
            _mm512_store_ps(output + d, _mm512_mul_ps(_mm512_load_ps(output + d), _mm512_set1_ps(factor)));
    }

    void accumulate(const KeyBlock<Row>& block, Ahead<Row>& ahead, const float* weights) {
        const int padded = round_up(block.count, 64);
        float units[kHeads];
        for (int h = 0; h < group_; ++h) units[h] = load_weights(weights + h * kDecodeBlock, block.count, padded, h);
        interleave(block, ahead, padded);
        const int64_t stride = int64_t(dim_) * 4;
        for (int d = 0; d < dim_; d += 64) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int k = 0; k < padded; k += 64) {
                const int8_t* four = fours_ + int64_t(k) * dim_ + d * 4;
                _tile_loadd(4, weights_ + k, kDecodeBlock);
                _tile_loadd(6, four, stride);
                _tile_dpbssd(0, 4, 6);
                _tile_loadd(7, four + 64, stride);
                _tile_dpbssd(1, 4, 7);
                _tile_loadd(6, four + 128, stride);
                _tile_dpbssd(2, 4, 6);
                _tile_loadd(7, four + 192, stride);
                _tile_dpbssd(3, 4, 7);
                ahead.advance(8);
            }
            _tile_stored(0, sums_, 64);
            _tile_stored(1, sums_ + 256, 64);
            _tile_stored(2, sums_ + 512, 64);
            _tile_stored(3, sums_ + 768, 64);
            for (int h = 0; h < group_; ++h)
                for (int i = 0; i < 4; ++i) {
                    const __m512i high = _mm512_load_si512(sums_ + i * 256 + h * 16);
                    const __m512i low = _mm512_load_si512(sums_ + i * 256 + (h + kHeads) * 16);
                    float* output = outputs_ + int64_t(h) * dim_ + d + i * 16;
                    _mm512_store_ps(output, _mm512_add_ps(_mm512_load_ps(output), joined(high, low, units[h])));
                }
        }
    }

    const float* finish() {
        // Of 64 channels, vector i has 4i..4i+3, 16+4i.., 32+4i.., 48+4i..: lanes of 128 bits change places.
        for (float* at = outputs_; at < outputs_ + int64_t(group_) * dim_; at += 64) {
            const __m512 a = _mm512_load_ps(at), b = _mm512_load_ps(at + 16);
            const __m512 c = _mm512_load_ps(at + 32), d = _mm512_load_ps(at + 48);
            const __m512 ab0 = _mm512_shuffle_f32x4(a, b, 0x44), ab1 = _mm512_shuffle_f32x4(a, b, 0xee);
            const __m512 cd0 = _mm512_shuffle_f32x4(c, d, 0x44), cd1 = _mm512_shuffle_f32x4(c, d, 0xee);
            _mm512_store_ps(at, _mm512_shuffle_f32x4(ab0, cd0, 0x88));
            _mm512_store_ps(at + 16, _mm512_shuffle_f32x4(ab0, cd0, 0xdd));
            _mm512_store_ps(at + 32, _mm512_shuffle_f32x4(ab1, cd1, 0x88));
            _mm512_store_ps(at + 48, _mm512_shuffle_f32x4(ab1, cd1, 0xdd));
        }
        return outputs_;
    }

private:
    static constexpr int kHeads = 8;
    static constexpr float kSteps = 127.0f * 128.0f;

    // Steps per unit of value; 0 where the unit is too small to be divided by, and all becomes 0.
    static float steps_of(float unit) { return unit > 1e-37f ? 1.0f / unit : 0.0f; }

    // Sixteen numbers from -16256 to 16256 become bytes of two planes.
    static FOVEATE_INLINE void split(__m512 x, int8_t* high, int8_t* low) {
        const __m512i whole = _mm512_cvtps_epi32(x);
        const __m512i up = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(64)), 7);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm512_cvtepi32_epi8(up));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(low),
                         _mm512_cvtepi32_epi8(_mm512_sub_epi32(whole, _mm512_slli_epi32(up, 7))));
    }

    static FOVEATE_INLINE __m512 joined(__m512i high, __m512i low, float unit) {
        const __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(high, 7), low);
        return _mm512_mul_ps(_mm512_cvtepi32_ps(whole), _mm512_set1_ps(unit));
    }

    // One head's weights as planes, zeros behind the last key. Returns their unit.
    float load_weights(const float* weights, int count, int padded, int head) {
        __m512 top = _mm512_setzero_ps(), sum = top;
        for (int k = 0; k < count; k += 16) {
            const __m512 x = _mm512_load_ps(weights + k);
            top = _mm512_max_ps(top, x);
            sum = _mm512_add_ps(sum, x);
        }
        const float unit = _mm512_reduce_max_ps(top) / kSteps;
        const __m512 steps = _mm512_set1_ps(steps_of(unit));
        int8_t* high = weights_ + head * kDecodeBlock;
        int8_t* low = weights_ + (head + kHeads) * kDecodeBlock;
        int k = 0;
        for (; k < count; k += 16) split(_mm512_mul_ps(_mm512_load_ps(weights + k), steps), high + k, low + k);
        if (k < padded) {
            __builtin_memset(high + k, 0, size_t(padded - k));
            __builtin_memset(low + k, 0, size_t(padded - k));
        }
        return _mm512_reduce_add_ps(sum) < kInfinity ? unit : __builtin_nanf("");  // a value that is NaN has weight NaN
    }

    void interleave(const KeyBlock<Row>& block, Ahead<Row>& ahead, int padded) {
        for (int k = 0; k < padded; k += 4) {
            const Row* row[4];
            for (int i = 0; i < 4; ++i)
                row[i] = k + i < block.count ? block.values[k + i] : reinterpret_cast<const Row*>(kZeroRow);
            ahead.advance(4);
            int8_t* four = fours_ + int64_t(k) * dim_;
            for (int d = 0; d < dim_; d += 64) {
                const __m512i a = _mm512_loadu_si512(row[0] + d), b = _mm512_loadu_si512(row[1] + d);
                const __m512i c = _mm512_loadu_si512(row[2] + d), e = _mm512_loadu_si512(row[3] + d);
                const __m512i ab0 = _mm512_unpacklo_epi8(a, b), ab1 = _mm512_unpackhi_epi8(a, b);
                const __m512i cd0 = _mm512_unpacklo_epi8(c, e), cd1 = _mm512_unpackhi_epi8(c, e);
                _mm512_store_si512(four + d * 4, _mm512_unpacklo_epi16(ab0, cd0));
                _mm512_store_si512(four + d * 4 + 64, _mm512_unpackhi_epi16(ab0, cd0));
                _mm512_store_si512(four + d * 4 + 128, _mm512_unpacklo_epi16(ab1, cd1));
                _mm512_store_si512(four + d * 4 + 192, _mm512_unpackhi_epi16(ab1, cd1));
            }
        }
    }

    // Four neighbouring columns of a tile of 16 x 16 sums, each in a vector.
    static FOVEATE_INLINE void columns(const int32_t* tile, __m512i (&column)[4]) {
        __m512 row[4];
        four_columns(reinterpret_cast<const float*>(tile), row);
        for (int i = 0; i < 4; ++i) column[i] = _mm512_castps_si512(row[i]);
    }

    const int dim_, group_;
    int8_t* planes_;    // [16][dim]
    int8_t* queries_;   // [dim / 4][16][4]: as tiles
    int8_t* gathered_;  // [kDecodeBlock][dim]
    int32_t* sums_;     // [4][16][16]
    int8_t* weights_;   // [16][kDecodeBlock]
    int8_t* fours_;     // [kDecodeBlock / 4][dim][4]
    float* outputs_;    // [group][dim]
    float units_[kHeads];  // of the queries
};

// Vector instructions do what tiles do not fit.
using ByteProducts = VectorProducts<FloatRows<Vec16, bfloat16, int8_t>>;

void decode_item_on_byte_tiles(const foveate_attention& call, const DecodeItem& item, float* partial, void* scratch) {
    if (ByteTileProducts::fits(call)) decode_item<ByteTileProducts>(call, item, partial, scratch);
    else decode_item<ByteProducts>(call, item, partial, scratch);
}

int64_t decode_scratch_on_byte_tiles(const foveate_attention& call) {
    return larger(decode_scratch<ByteTileProducts>(call), decode_scratch<ByteProducts>(call));
}

}  // namespace
