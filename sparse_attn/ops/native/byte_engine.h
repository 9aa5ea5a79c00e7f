// Logits of int8 keys by dot products of bytes (VNNI), at twice the rate of bfloat16's, where there are no tiles: for anchors
// alone, where a query rounded to 8 bits costs about what rounding its keys did.
//
// Keys are multiplied as they lie in their pages. Queries are 128 too high, since one side must be unsigned.
#pragma once

#include "byte_queries.h"
#include "prefill.h"

#if defined(__AVX512VNNI__)

namespace {

class ByteEngine {
public:
    using Simd = Vec16;
    using T = bfloat16;
    using Row = int8_t;
    static constexpr int W = Simd::W;
    static constexpr int kRows = 8;  // 24 of 32 registers are sums
    static constexpr int kVectors = 3;
    static constexpr int kBlock = 128;
    static constexpr bool kPairs = false;
    static constexpr bool kBytes = true;
    static constexpr bool kWords = false;

    // Fours of bytes, and what a level is worth.
    static constexpr int units(int dim) { return dim / 4 + 1; }
    static int64_t scratch(int) { return 0; }

    static void pack(const T* const* source, int dim, float* target) {
        pack_bytes<Lanes16, int(kLevels8), 128>(source, dim, target);
    }

    ByteEngine(void*, int dim) : dim_(dim) {}

    // What 128 too much in every channel of a query comes to.
    void load_keys(const KeyBlock<Row>& block) {
        for (int i = 0; i < block.count; ++i) {
            __m512i sums = Vec16::set_int(0);
            for (int d = 0; d < dim_; d += 64) {
                const __mmask64 held = dim_ - d >= 64 ? ~__mmask64(0) : (__mmask64(1) << (dim_ - d)) - 1;
                const __m512i key = _mm512_maskz_loadu_epi8(held, block.keys[i] + d);
                sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(char(128)), key);
            }
            excess_[i] = _mm512_reduce_add_epi32(sums);
        }
    }

    void logits(const KeyBlock<Row>& block, const float* queries, float* out, int first, int last) const {
        for (int k = first; k < last; k += kRows) multiply(block, queries, out, k, last - 1);
    }

private:
    // Keys from ``key`` on; behind ``last`` that is repeated. Not inlined: in a larger function GCC spills the sums. Every
    // loop over them is unrolled for the same reason.
    __attribute__((noinline)) void multiply(const KeyBlock<Row>& block, const float* queries, float* out, int key, int last) const {
        const int fours = dim_ / 4;
        const int64_t vector = int64_t(units(dim_)) * W;
        const int8_t* a[kRows];
        __m512i sums[kRows][kVectors];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            const int at = smaller(key + r, last);
            a[r] = block.keys[at];
#pragma GCC unroll 8
            for (int c = 0; c < kVectors; ++c) sums[r][c] = Vec16::set_int(-excess_[at]);
        }
        for (int u = 0; u < fours; ++u) {
            __m512i column[kVectors];
#pragma GCC unroll 8
            for (int c = 0; c < kVectors; ++c) column[c] = Lanes16::load(queries + u * W + c * vector);
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
                const __m512i four = _mm512_set1_epi32(four_bytes(a[r] + 4 * u));
#pragma GCC unroll 8
                for (int c = 0; c < kVectors; ++c) sums[r][c] = Lanes16::dot(sums[r][c], column[c], four);
            }
        }
#pragma GCC unroll 8
        for (int c = 0; c < kVectors; ++c) {
            const __m512 worth = Vec16::load(queries + fours * W + c * vector);
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
                const __m512 scale = Vec16::mul(worth, Vec16::set(block.key_scales[smaller(key + r, last)]));
                Vec16::store(out + (int64_t(c) * kBlock + key + r) * W, Vec16::mul(Lanes16::to_float(sums[r][c]), scale));
            }
        }
    }

    const int dim_;
    int32_t excess_[kBlock];
};

}  // namespace

#endif
