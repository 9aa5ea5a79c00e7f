// Both products of prefill on AMX tiles.
//
// Logits: A = 16 keys x 32 channels straight from the page, B = the packed columns, C = 16 keys x 16 columns.
// Values: A = 16 channels x 32 keys, which is V transposed, packed once per block for all columns of the item (about
// 6 % of the time with 384 of them); B = pairs of weights as the softmax leaves them, every other row of its logits.
#pragma once

#include "fma_engine.h"
#include "tiles.h"

namespace {

struct AmxEngine {
    using Simd = Vec16;
    using T = bfloat16;
    using Row = bfloat16;
    using F = __m512;
    static constexpr int W = 16;
    static constexpr int kVectors = 2;
    static constexpr int kBlock = 128;  // K, V and logits of a pass are 48 KiB at 64 channels; 256 keys ran 9 % slower
    static constexpr int kPad = 32;
    static constexpr bool kPairs = true;
    static constexpr bool kBytes = false;
    static constexpr bool kWords = false;

    static int padded(int dim) { return round_up(dim, 32); }
    static int units(int dim) { return padded(dim) / 2; }
    static int64_t scratch(int dim) { return int64_t(kBlock) * (padded(dim) + dim) * 2; }
    static FOVEATE_INLINE void store_pair(float* p, F a, F b) { store_bfloat16_pairs(p, a, b); }
    static void pack(const T* const* source, int dim, float* target) {
        pack_columns<Units<Simd, T>>(source, dim / 2, units(dim), target);
    }

    AmxEngine(void* memory, int dim)
        : dim_(dim),
          padded_(padded(dim)),
          gathered_(static_cast<bfloat16*>(memory)),
          values_(gathered_ + int64_t(kBlock) * padded_) {}

    // Only what ``logits`` needs.
    void load_keys(const KeyBlock<T>& block) {
        const int count = round_up(block.count, 32);
        for (int i = 0; i < count; i += 16) load_keys(block, i);
    }

    void load(const KeyBlock<T>& block) {
        load_keys(block);
        const int count = round_up(block.count, 32);
        for (int i = 0; i < count; i += 32)
            for (int d = 0; d < dim_; d += 16) load_values(block, i, d);
    }

    void logits(const KeyBlock<T>&, const float* queries, float* out, int first, int last) {
        const int64_t vector = int64_t(units(dim_)) * W;
        const int steps = padded_ / 32;
        for (int k = first; k < last; k += 32) {
            const bfloat16* a0 = keys_[k / 16];
            const bfloat16* a1 = keys_[k / 16 + 1];
            const int64_t stride0 = strides_[k / 16], stride1 = strides_[k / 16 + 1];
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int s = 0; s < steps; ++s) {
                const float* b = queries + s * 16 * W;
                _tile_loadd(4, a0 + s * 32, stride0);
                _tile_loadd(6, b, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, b + vector, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, a1 + s * 32, stride1);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            float* target = out + k * W;
            _tile_stored(0, target, 64);
            _tile_stored(1, target + kBlock * W, 64);
            _tile_stored(2, target + 16 * W, 64);
            _tile_stored(3, target + (kBlock + 16) * W, 64);
        }
    }

    void accumulate(const KeyBlock<T>&, const float* weights, float* outputs, int first, int last) {
        const int64_t vector = int64_t(dim_) * W;
        const int tiles = dim_ / 16;
        int d = 0;
        for (; d + 2 <= tiles; d += 2) {
            float* out = outputs + d * 16 * W;
            _tile_loadd(0, out, 64);
            _tile_loadd(1, out + vector, 64);
            _tile_loadd(2, out + 16 * W, 64);
            _tile_loadd(3, out + vector + 16 * W, 64);
            for (int k = first; k < last; k += 32) {
                const bfloat16* a = values_ + int64_t(k / 32 * tiles + d) * 512;
                const float* b = weights + k * W;
                _tile_loadd(4, a, 64);
                _tile_loadd(6, b, 128);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, b + kBlock * W, 128);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, a + 512, 64);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, out, 64);
            _tile_stored(1, out + vector, 64);
            _tile_stored(2, out + 16 * W, 64);
            _tile_stored(3, out + vector + 16 * W, 64);
        }
        if (d < tiles) {
            float* out = outputs + d * 16 * W;
            _tile_loadd(0, out, 64);
            _tile_loadd(1, out + vector, 64);
            for (int k = first; k < last; k += 32) {
                const float* b = weights + k * W;
                _tile_loadd(4, values_ + int64_t(k / 32 * tiles + d) * 512, 64);
                _tile_loadd(6, b, 128);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, b + kBlock * W, 128);
                _tile_dpbf16ps(1, 4, 7);
            }
            _tile_stored(0, out, 64);
            _tile_stored(1, out + vector, 64);
        }
    }

private:
    // Sixteen keys from ``i`` on: where they lie if that is a tile already, else a copy padded by zeros.
    void load_keys(const KeyBlock<T>& block, int i) {
        const int held = larger(0, smaller(16, block.count - i));
        bool side_by_side = held == 16 && dim_ == padded_;
        for (int r = 1; side_by_side && r < 16; ++r) side_by_side = block.keys[i + r] == block.keys[i] + r * dim_;
        if (side_by_side) {
            keys_[i / 16] = block.keys[i];
            strides_[i / 16] = dim_ * 2;
            return;
        }
        bfloat16* copy = gathered_ + int64_t(i) * padded_;
        __builtin_memset(copy, 0, size_t(16) * padded_ * 2);
        for (int r = 0; r < held; ++r) __builtin_memcpy(copy + r * padded_, block.keys[i + r], size_t(dim_) * 2);
        keys_[i / 16] = copy;
        strides_[i / 16] = padded_ * 2;
    }

    // Channels d..d+15 of 32 keys from ``i`` on, transposed: [16 channels][16 pairs of keys].
    void load_values(const KeyBlock<T>& block, int i, int d) {
        __m512 tile[16];
        for (int r = 0; r < 16; ++r) {
            const int k = i + 2 * r;
            __m512i low = _mm512_setzero_si512(), high = low;
            if (k < block.count) low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(block.values[k] + d)));
            if (k + 1 < block.count)
                high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(block.values[k + 1] + d)));
            tile[r] = _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
        Vec16::transpose(tile);
        float* target = reinterpret_cast<float*>(values_ + int64_t(i / 32 * (dim_ / 16) + d / 16) * 512);
        for (int r = 0; r < 16; ++r) _mm512_storeu_ps(target + r * 16, tile[r]);
    }

    const int dim_, padded_;
    bfloat16* gathered_;
    bfloat16* values_;
    const bfloat16* keys_[kBlock / 16];
    int64_t strides_[kBlock / 16];
};

}  // namespace
