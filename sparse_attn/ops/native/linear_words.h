// Linear layers of 8-bit weights for many rows on AVX2, which multiplies words in pairs 1.6 times as fast as floats at best.
//
// Weights and quantised inputs, of 8 or of 16 bits, are widened to words once per piece of 512 input channels: a sum of
// 512 products of 127 and 32,512 fits 32 bits. Pieces are added up in float32. AVX2's product of bytes would saturate.
#pragma once

#include "linear_dot.h"
#include "linear_lanes.h"

namespace {

struct WordPieces {
    static constexpr int64_t kDepth = 512;      // input channels of a piece
    static constexpr int kRows = 4;             // 5 and 6 were no faster
    static constexpr int64_t kLeastRows = 12;   // from which on widening the weights pays
    // Scratch per row: its words and its sums, and a share of the weights' words.
    static constexpr int64_t kRowBytes = kDepth * 2 + kMostChannels * 4 + kBlock * kDepth * 2 / kLeastRows + 64;

    int16_t* inputs;   // [rows][kDepth]
    float* sums;       // [rows][kMostChannels]
    int16_t* weights;  // [kDepth / 2][kBlock][2]

    WordPieces(void* memory, int64_t rows)
        : inputs(static_cast<int16_t*>(memory)),
          sums(reinterpret_cast<float*>(inputs + rows * kDepth)),
          weights(reinterpret_cast<int16_t*>(sums + rows * kMostChannels)) {}

    // ``depth`` inputs of a row: bytes, 128 too high, or two planes of them. A multiple of 16.
    void load_inputs(const Activations& from, int64_t row, int64_t at, int64_t depth, int16_t* to) const {
        const uint8_t* high = from.bytes + row * from.planes * from.stride + at;
        const __m256i bias = _mm256_set1_epi16(128);
        const auto words = [&](const uint8_t* p) {
            return _mm256_sub_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), bias);
        };
        for (int64_t k = 0; k < depth; k += 16) {
            __m256i x = words(high + k);
            if (from.planes == 2)
                x = _mm256_add_epi16(_mm256_slli_epi16(x, 8), words(high + from.stride + k));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), x);
        }
    }

    // The bytes of a block of output channels, four inputs side by side, to words, two side by side.
    void load_weights(const int8_t* from, int64_t depth) const {
        const __m256i first = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(-1, 0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13));
        const __m256i second = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(-1, 2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15));
        for (int64_t k = 0; k < depth; k += 4)
            for (int c = 0; c < kBlock; c += 8) {
                const __m256i fours = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + k * kBlock + c * 4));
                int16_t* to = weights + k * kBlock + c * 2;
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                                    _mm256_srai_epi16(_mm256_shuffle_epi8(fours, first), 8));
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 2 * kBlock),
                                    _mm256_srai_epi16(_mm256_shuffle_epi8(fours, second), 8));
            }
    }

    // Adds to the sums of R rows and a block of output channels.
    template <int R>
    static void add(const int16_t* a, const int16_t* w, int64_t depth, float* to) {
        __m256i acc[R][2];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
        for (int64_t k = 0; k < depth; k += 2, w += 2 * kBlock) {
            const __m256i left = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
            const __m256i right = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + kBlock));
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const __m256i pair = _mm256_set1_epi32(four_bytes(a + r * kDepth + k));
                add_products(acc[r][0], pair, left);
                add_products(acc[r][1], pair, right);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < 2; ++j) {
                float* sum = to + r * kMostChannels + j * Vec8::W;
                Vec8::store(sum, Vec8::add(Vec8::load(sum), _mm256_cvtepi32_ps(acc[r][j])));
            }
    }

    void add_rows(int64_t rows, int64_t depth, float* to) const {
        int64_t row = 0;
        for (; row + kRows <= rows; row += kRows)
            add<kRows>(inputs + row * kDepth, weights, depth, to + row * kMostChannels);
        const int16_t* a = inputs + row * kDepth;
        float* rest = to + row * kMostChannels;
        switch (rows - row) {
            case 1: add<1>(a, weights, depth, rest); break;
            case 2: add<2>(a, weights, depth, rest); break;
            case 3: add<3>(a, weights, depth, rest); break;
            default: break;
        }
    }
};

// As DotLinear::multiply, for 8 bits.
inline void multiply_words(const foveate_linear& call, const Activations& input, int64_t first, int64_t last,
                           int64_t first_block, int64_t last_block, void* scratch) {
    const int64_t rows = last - first;
    const WordPieces pieces(scratch, rows);
    __builtin_memset(pieces.sums, 0, size_t(rows * kMostChannels) * 4);
    for (int64_t at = 0; at < input.stride; at += WordPieces::kDepth) {
        const int64_t depth = smaller(WordPieces::kDepth, input.stride - at);
        for (int64_t row = 0; row < rows; ++row)
            pieces.load_inputs(input, first + row, at, depth, pieces.inputs + row * WordPieces::kDepth);
        for (int64_t block = first_block; block < last_block; ++block) {
            pieces.load_weights(static_cast<const int8_t*>(call.weight) + (block * input.stride + at) * kBlock, depth);
            pieces.add_rows(rows, depth, pieces.sums + (block - first_block) * kBlock);
        }
    }
    for (int64_t row = 0; row < rows; ++row) {
        const Vec8::F scale = Vec8::set(input.scales[first + row]);
        const float* sums = pieces.sums + row * kMostChannels;
        for (int64_t c = first_block * kBlock; c < last_block * kBlock; c += Vec8::W) {
            const Vec8::F sum = Vec8::load(sums + c - first_block * kBlock);
            put<Vec8>(call, first + row, c, Vec8::mul(sum, Vec8::mul(scale, Vec8::load(call.scales + c))));
        }
    }
}

}  // namespace
