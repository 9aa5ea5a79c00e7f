// Linear layers of 4-bit weights and 8-bit inputs for many rows on AVX2: three times the rate of floats.
//
// AVX2's product of bytes adds two of them in 16 bits, which hold all that a group of 32 input channels makes of a
// lane: 16 products of 15 and 127. So most of a group's work is one product and one sum of 32 pairs each; only its total
// is widened, and multiplied by what a level of the inputs and a step of the weights are worth. Three rows and 16 output
// channels have their sums in registers (43 cycles for a group of both; sums in memory took a sixth longer).
#pragma once

#include "linear_dot.h"
#include "linear_lanes.h"

namespace {

// Weights of a block as they lie, 16 output channels of a group in 256 bytes, for few rows: read once, unpacked each time.
struct PackedNibbles {
    const uint8_t* weights;
    const uint16_t* steps;  // [groups][2][kBlock]

    FOVEATE_INLINE __m256i fours(int64_t group, int i, int j) const {
        const __m256i both = Lanes8<WordDot>::load(weights + group * 256 + i % 4 * 64 + j * 32);
        return i < 4 ? Lanes8<WordDot>::low_nibbles(both) : Lanes8<WordDot>::high_nibbles(both);
    }
    FOVEATE_INLINE void fetch(int64_t group) const {
        for (int64_t at = 0; at < 256; at += 64)
            _mm_prefetch(reinterpret_cast<const char*>(weights + group * 256 + kAhead + at), _MM_HINT_T0);
    }
    FOVEATE_INLINE __m256 step(int64_t group, int j) const { return Vec8::load(steps + group * 2 * kBlock + j * Vec8::W); }
    FOVEATE_INLINE __m256 zero(int64_t group, int j) const {
        return Vec8::load(steps + (group * 2 + 1) * kBlock + j * Vec8::W);
    }
    // The sum of two words each, in steps.
    FOVEATE_INLINE __m256 stepped(__m256i words, int64_t group, int j) const {
        return Vec8::mul(_mm256_cvtepi32_ps(_mm256_madd_epi16(words, _mm256_set1_epi16(1))), step(group, j));
    }
    static FOVEATE_INLINE __m256 in_units(__m256 sum, int) { return sum; }
    static FOVEATE_INLINE __m256 of_units(__m256 sum, int) { return sum; }
};

// A byte per weight, for many rows, and steps as words, by which sums are multiplied as they are widened. An output
// channel has a unit for those of a piece, a power of two, so that sums come out as those of PackedNibbles, to the bit, but
// for steps that are less than a 128th of the largest: those are rounded by at most 2^-15 of it.
struct UnpackedNibbles {
    uint8_t* weights;  // [groups][8][kBlock][4]
    int32_t* steps;    // [groups][kBlock], a word twice
    float* zeros;      // [groups][kBlock]
    float* units;      // [2][kBlock]: and 1 over it

    FOVEATE_INLINE __m256i fours(int64_t group, int i, int j) const {
        return Lanes8<WordDot>::load(weights + group * 512 + i * 64 + j * 32);
    }
    FOVEATE_INLINE void fetch(int64_t) const {}
    FOVEATE_INLINE __m256 zero(int64_t group, int j) const { return Vec8::load(zeros + group * kBlock + j * Vec8::W); }
    FOVEATE_INLINE __m256 stepped(__m256i words, int64_t group, int j) const {
        return _mm256_cvtepi32_ps(_mm256_madd_epi16(words, Lanes8<WordDot>::load(steps + group * kBlock + j * Vec8::W)));
    }
    FOVEATE_INLINE __m256 in_units(__m256 sum, int j) const {
        return Vec8::mul(sum, Vec8::load(units + kBlock + j * Vec8::W));
    }
    FOVEATE_INLINE __m256 of_units(__m256 sum, int j) const { return Vec8::mul(sum, Vec8::load(units + j * Vec8::W)); }

    void take(const PackedNibbles& from, int64_t groups) const {
        for (int j = 0; j < 2; ++j) {
            __m256 top = Vec8::set(0x1p-50f);
            for (int64_t g = 0; g < groups; ++g) top = Vec8::max(top, _mm256_andnot_ps(Vec8::set(-0.0f), from.step(g, j)));
            // The largest step is 2^14 units and less than 2^15.
            const __m256 power = _mm256_and_ps(_mm256_min_ps(top, Vec8::set(0x1p127f)), Vec8::set(__builtin_inff()));
            const __m256 unit = Vec8::mul(power, Vec8::set(0x1p-14f)), inverse = Vec8::div(Vec8::set(1.0f), unit);
            Vec8::store(units + j * Vec8::W, unit);
            Vec8::store(units + kBlock + j * Vec8::W, inverse);
            for (int64_t g = 0; g < groups; ++g) {
                const __m256 step = from.step(g, j);
                const __m256i word = _mm256_cvtps_epi32(Vec8::mul(step, inverse));
                const __m256i twice = _mm256_blend_epi16(word, _mm256_slli_epi32(word, 16), 0xaa);
                Lanes8<WordDot>::store(steps + g * kBlock + j * Vec8::W, twice);
                // What a word does not hold, inf and NaN, zero does.
                const __m256 zero = Vec8::add(from.zero(g, j), _mm256_sub_ps(step, step));
                Vec8::store(zeros + g * kBlock + j * Vec8::W, Vec8::mul(zero, inverse));
                for (int i = 0; i < 8; ++i)
                    Lanes8<WordDot>::store(weights + g * 512 + i * 64 + j * 32, from.fours(g, i, j));
            }
        }
    }
};

// What is read of P rows that lie side by side. Many rows are read again for every block of output channels: panels of three
// are three streams instead of nine, and 1.15 times as fast.
template <int P>
struct NibblePanel {
    const uint8_t* bytes;
    const float* worths;
    const float* totals;

    NibblePanel(const Activations& input, int64_t place)
        : bytes(input.bytes + place * kGroup), worths(input.scales + place), totals(input.group_sums + place) {}
    FOVEATE_INLINE int32_t four(int r, int64_t group, int i) const {
        return four_bytes(bytes + (group * P + r) * kGroup + i * 4);
    }
    FOVEATE_INLINE __m256 worth(int r, int64_t group) const { return Vec8::set(worths[group * P + r]); }
    FOVEATE_INLINE __m256 total(int r, int64_t group) const { return Vec8::set(totals[group * P + r]); }
};

// Adds to the sums [R][kBlock] of R rows and the output channels of a block. Not inlined: in a larger function GCC spills
// the sums.
template <int R, int P, class Weights>
__attribute__((noinline)) void add_groups(const NibblePanel<P>& rows, const Weights& weights, int64_t groups, float* to) {
    __m256 out[R][2];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < 2; ++j) out[r][j] = weights.in_units(Vec8::load(to + r * kBlock + j * Vec8::W), j);
    for (int64_t g = 0; g < groups; ++g) {
        weights.fetch(g);
        __m256i acc[R][2];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            const __m256i left = weights.fours(g, i, 0), right = weights.fours(g, i, 1);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const __m256i x = _mm256_set1_epi32(rows.four(r, g, i));
                const __m256i l = _mm256_maddubs_epi16(left, x), h = _mm256_maddubs_epi16(right, x);
                acc[r][0] = i ? _mm256_add_epi16(acc[r][0], l) : l;
                acc[r][1] = i ? _mm256_add_epi16(acc[r][1], h) : h;
                FOVEATE_HOLD(acc[r][0]);  // or GCC moves sums
                FOVEATE_HOLD(acc[r][1]);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const __m256 worth = rows.worth(r, g), total = rows.total(r, g);
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j) {
                const __m256 stepped = weights.stepped(acc[r][j], g, j);
                out[r][j] = Vec8::fma(total, weights.zero(g, j), out[r][j]);
                out[r][j] = Vec8::fma(stepped, worth, out[r][j]);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < 2; ++j) Vec8::store(to + r * kBlock + j * Vec8::W, weights.of_units(out[r][j], j));
}

// The same for ``rows`` rows from ``row`` on, at whose groups from ``group`` on the weights begin.
template <int P, class Weights>
void add_rows(const Activations& input, int64_t row, int64_t rows, int64_t group, const Weights& weights, int64_t groups,
              float* to) {
    int64_t place = input.at(row, group);
    for (int64_t end = row + rows; row < end; row += P, place += P * (input.stride / kGroup), to += P * kBlock) {
        const NibblePanel<P> panel(input, place);
        switch (smaller<int64_t>(P, end - row)) {
            case 1: add_groups<1>(panel, weights, groups, to); break;
            case 2: add_groups<(P < 2 ? P : 2)>(panel, weights, groups, to); break;
            default: add_groups<P>(panel, weights, groups, to);
        }
    }
}

struct NibblePieces {
    static constexpr int kPanel = 3;           // of calls of more than one row
    static constexpr int64_t kGroups = 24;     // of a piece: its weights are 12 KiB of L1
    static constexpr int64_t kLeastRows = 8;   // from which on unpacking the weights pays
    static constexpr int64_t kShared = kGroups * (8 * kBlock * 4 + 2 * kBlock * 4) + 2 * kBlock * 4;
    // Scratch per row, of which an item gets at least 32: its sums, and a share of the weights and their steps.
    static constexpr int64_t kRowBytes = kMostChannels * 4 + kShared / 32;
};

// As DotLinear::multiply, for 4 bits and one plane.
inline void multiply_nibbles(const foveate_linear& call, const Activations& input, int64_t first, int64_t last,
                             int64_t first_block, int64_t last_block, void* scratch) {
    constexpr int64_t kGroups = NibblePieces::kGroups;
    constexpr int kPanel = NibblePieces::kPanel;
    const int64_t rows = last - first, blocks = last_block - first_block, groups = input.stride / kGroup;
    float* sums = static_cast<float*>(scratch);  // [blocks][rows][kBlock]
    float* units = sums + blocks * rows * kBlock;
    float* zeros = units + 2 * kBlock;
    int32_t* steps = reinterpret_cast<int32_t*>(zeros + kGroups * kBlock);
    const UnpackedNibbles unpacked{reinterpret_cast<uint8_t*>(steps + kGroups * kBlock), steps, zeros, units};
    const bool many = rows >= NibblePieces::kLeastRows;
    const int64_t depth = many ? kGroups : groups;
    __builtin_memset(sums, 0, size_t(blocks * rows * kBlock) * 4);
    for (int64_t at = 0; at < groups; at += depth) {
        const int64_t held = smaller(depth, groups - at);
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t group = (first_block + block) * groups + at;
            const PackedNibbles packed{static_cast<const uint8_t*>(call.weight) + group * 256,
                                       call.groups + group * 2 * kBlock};
            float* to = sums + block * rows * kBlock;
            if (many) {
                unpacked.take(packed, held);
                add_rows<kPanel>(input, first, rows, at, unpacked, held, to);
            } else if (input.panel == kPanel) {
                add_rows<kPanel>(input, first, rows, at, packed, held, to);
            } else {
                add_rows<1>(input, first, rows, at, packed, held, to);
            }
        }
    }
    put_sums<Vec8>(call, sums, first, rows, first_block, blocks);
}

}  // namespace
