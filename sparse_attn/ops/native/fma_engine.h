// Both products of prefill by vector instructions: one 32-bit unit of K or V is broadcast against vectors of columns.
//
// K and V need no packing for it: a unit is a float of a row (two bfloat16 channels for the dot-product engine), read
// where the row lies. Each element of K is used for 48 columns (24 on AVX2) from one register block, so broadcasts,
// which cost only a load port, stay under two a cycle.
#pragma once

#include "prefill.h"

namespace {

// acc[r][c] over `steps` units: a[r][k * a_step] against b[c][k][W].
template <class Mac, int R, int C, bool kLoad>
FOVEATE_INLINE void product(const float* const (&a)[R], int64_t a_step, const float* b, int64_t b_step, int64_t b_vector,
                            int steps, float* out, int64_t out_row, int64_t out_vector) {
    using Simd = typename Mac::Simd;
    typename Simd::F acc[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c)
            acc[r][c] = kLoad ? Simd::load(out + r * out_row + c * out_vector) : Simd::zero();
    for (int k = 0; k < steps; ++k) {
        typename Simd::F column[C];
        for (int c = 0; c < C; ++c) column[c] = Simd::load(b + k * b_step + c * b_vector);
        for (int r = 0; r < R; ++r) {
            const typename Simd::F unit = Simd::set(a[r][k * a_step]);
            for (int c = 0; c < C; ++c) acc[r][c] = Mac::mac(unit, column[c], acc[r][c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) Simd::store(out + r * out_row + c * out_vector, acc[r][c]);
}

// The two loops around ``product`` that both engines share.
template <class Mac, int R, int C, int kBlock>
struct Products {
    using Simd = typename Mac::Simd;
    static constexpr int W = Simd::W;

    // rows: ``count`` row pointers in units; the last is repeated to fill a register block.
    static void logits(const float* const* rows, int first, int last, const float* queries, int units, float* out) {
        for (int k = first; k < last; k += R) {
            const float* a[R];
            for (int r = 0; r < R; ++r) a[r] = rows[smaller(k + r, last - 1)];
            product<Mac, R, C, false>(a, 1, queries, W, int64_t(units) * W, units, out + k * W, W, int64_t(kBlock) * W);
        }
    }
};

template <class S>
struct FloatMac {
    using Simd = S;
    static FOVEATE_INLINE typename S::F mac(typename S::F a, typename S::F b, typename S::F c) { return S::fma(a, b, c); }
};

// Logits of a pass: 24 KiB, 6 on AVX2, whose L1 holds keys and values beside them then.
template <class S>
constexpr int kFmaBlock = S::W == 16 ? 128 : 64;

// float32 arithmetic; K and V of fewer bits are widened once per block and item. ``kKeys``: of a block.
template <class S, class Result, class Storage = Result, int kKeys = kFmaBlock<S>>
struct FmaEngine {
    using Simd = S;
    using T = Result;
    using Row = Storage;
    using F = typename S::F;
    static constexpr int W = S::W;
    static constexpr int kRows = W == 16 ? 8 : 4;  // 24 of 32, 12 of 16 registers are accumulators
    static constexpr int kVectors = 3;
    static constexpr int kBlock = kKeys;
    static constexpr int kPad = 1;
    static constexpr bool kPairs = false;
    static constexpr bool kBytes = KeyBlock<Row>::kScaled;
    static constexpr bool kWords = false;
    static constexpr bool kWiden = sizeof(Row) < 4;
    using Loops = Products<FloatMac<S>, kRows, kVectors, kBlock>;

    static constexpr int units(int dim) { return dim; }
    static int64_t scratch(int dim) { return kWiden ? int64_t(2) * kBlock * dim * 4 : 0; }
    static FOVEATE_INLINE F load_units(const T* row, int unit) { return S::load(row + unit); }
    static FOVEATE_INLINE float load_unit(const T* row, int unit) { return to_float(row[unit]); }
    static void pack(const T* const* source, int dim, float* target) {
        pack_columns<FmaEngine>(source, dim, dim, target);
    }

    FmaEngine(void* memory, int dim) : dim_(dim), wide_(static_cast<float*>(memory)) {}

    void load(const KeyBlock<Row>& block) {
        load_keys(block);
        load_values(block);
    }

    // Only what ``logits`` needs.
    void load_keys(const KeyBlock<Row>& block) {
        for (int i = 0; i < block.count; ++i) {
            float scale = 1.0f;
            if constexpr (KeyBlock<Row>::kScaled) scale = block.key_scales[i];
            keys_[i] = in_float(block.keys[i], scale, wide_ + int64_t(i) * dim_);
        }
    }

    // Only what ``accumulate`` needs.
    void load_values(const KeyBlock<Row>& block) {
        for (int i = 0; i < block.count; ++i) {
            float scale = 1.0f;
            if constexpr (KeyBlock<Row>::kScaled) scale = block.value_scales[i];
            values_[i] = in_float(block.values[i], scale, wide_ + int64_t(kBlock + i) * dim_);
        }
    }

    void logits(const KeyBlock<Row>&, const float* queries, float* out, int first, int last) {
        Loops::logits(keys_, first, last, queries, dim_, out);
    }

    void accumulate(const KeyBlock<Row>&, const float* weights, float* outputs, int first, int last) {
        const int64_t vector = int64_t(dim_) * W;
        for (int d = 0; d < dim_; d += kRows) {
            F acc[kRows][kVectors];
            float* out = outputs + d * W;
            for (int r = 0; r < kRows; ++r)
                for (int c = 0; c < kVectors; ++c) acc[r][c] = S::load(out + r * W + c * vector);
            for (int k = first; k < last; ++k) {
                const float* value = values_[k] + d;
                F column[kVectors];
                for (int c = 0; c < kVectors; ++c) column[c] = S::load(weights + (c * kBlock + k) * W);
                for (int r = 0; r < kRows; ++r) {
                    const F unit = S::set(value[r]);
                    for (int c = 0; c < kVectors; ++c) acc[r][c] = S::fma(unit, column[c], acc[r][c]);
                }
            }
            for (int r = 0; r < kRows; ++r)
                for (int c = 0; c < kVectors; ++c) S::store(out + r * W + c * vector, acc[r][c]);
        }
    }

private:
    const float* in_float(const Row* row, float scale, float* copy) const {
        if constexpr (!kWiden) {
            return row;
        } else {
            for (int d = 0; d < dim_; d += 8) {
                Vec8::F x = Vec8::load(row + d);
                if constexpr (KeyBlock<Row>::kScaled) x = Vec8::mul(x, Vec8::set(scale));
                Vec8::store(copy + d, x);
            }
            return copy;
        }
    }

    const float* keys_[kBlock];
    const float* values_[kBlock];

protected:
    const int dim_;
    float* wide_;  // [2][kBlock][dim] if kWiden: keys, then values
};

#if defined(__AVX512BF16__)

// Two float vectors as pairs of bfloat16, ``a`` in the low halves: ties away from zero, four instructions.
FOVEATE_INLINE void store_bfloat16_pairs(float* p, __m512 a, __m512 b) {
    const __m512i half = _mm512_set1_epi32(0x8000);
    const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(a), half), 16);
    const __m512i high = _mm512_add_epi32(_mm512_castps_si512(b), half);
    _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaau, low, high));
}

struct DotMac {
    using Simd = Vec16;
    static FOVEATE_INLINE __m512 mac(__m512 a, __m512 b, __m512 c) {
        return _mm512_dpbf16_ps(c, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
    }
};

// bfloat16 dot products. K is read in place as pairs of channels; V is interleaved into pairs of keys per block.
struct DotEngine {
    using Simd = Vec16;
    using T = bfloat16;
    using Row = bfloat16;
    using F = __m512;
    static constexpr int W = 16;
    static constexpr int kRows = 8;
    static constexpr int kVectors = 3;
    static constexpr int kBlock = 128;
    static constexpr int kPad = 2;
    static constexpr bool kPairs = true;
    static constexpr bool kBytes = false;
    static constexpr bool kWords = false;
    using Loops = Products<DotMac, kRows, kVectors, kBlock>;

    static constexpr int units(int dim) { return dim / 2; }
    static int64_t scratch(int dim) { return int64_t(kBlock / 2) * dim * 4; }
    static FOVEATE_INLINE void store_pair(float* p, F a, F b) { store_bfloat16_pairs(p, a, b); }
    static void pack(const T* const* source, int dim, float* target) {
        pack_columns<Units<Simd, T>>(source, dim / 2, dim / 2, target);
    }

    DotEngine(void* memory, int dim) : dim_(dim), pairs_(static_cast<float*>(memory)) {}

    // Only what ``logits`` needs.
    void load_keys(const KeyBlock<T>& block) {
        for (int i = 0; i < block.count; ++i) keys_[i] = reinterpret_cast<const float*>(block.keys[i]);
    }

    void load(const KeyBlock<T>& block) {
        load_keys(block);
        for (int i = 0; i < block.count; i += 2) {
            const bfloat16* even = block.values[i];
            const bfloat16* odd =
                i + 1 < block.count ? block.values[i + 1] : reinterpret_cast<const bfloat16*>(kZeroRow);
            float* pair = pairs_ + int64_t(i / 2) * dim_;
            for (int d = 0; d < dim_; d += 16) {
                const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(even + d)));
                const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(odd + d)));
                _mm512_storeu_si512(pair + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
        }
    }

    void logits(const KeyBlock<T>&, const float* queries, float* out, int first, int last) {
        Loops::logits(keys_, first, last, queries, dim_ / 2, out);
    }

    void accumulate(const KeyBlock<T>&, const float* weights, float* outputs, int first, int last) {
        for (int d = 0; d < dim_; d += kRows) {
            const float* a[kRows];
            for (int r = 0; r < kRows; ++r) a[r] = pairs_ + int64_t(first / 2) * dim_ + d + r;
            product<DotMac, kRows, kVectors, true>(a, dim_, weights + first * W, 2 * W, int64_t(kBlock) * W,
                                                   (last - first + 1) / 2, outputs + d * W, W, int64_t(dim_) * W);
        }
    }

private:
    const int dim_;
    float* pairs_;
    const float* keys_[kBlock];
};

#endif

}  // namespace
