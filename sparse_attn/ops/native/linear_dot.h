// Linear layers by dot products of four bytes, for one instruction set ``Isa`` (see isa_linear_*.cpp).
#pragma once

#include "linear_input.h"

namespace {

constexpr int kBlock = 16;  // output channels of a block of weights
constexpr int64_t kAhead = 1024;  // bytes of weights that are fetched before they are needed

// What belongs to a vector of output channels of an 8-bit layer.
template <class Vec>
struct Columns {
    typename Vec::F scale;
    typename Vec::I bias;  // what the sums are too high by
    int64_t channel;
};

template <class Vec, class T>
FOVEATE_INLINE void put_as(const foveate_linear& call, int64_t row, int64_t channel, typename Vec::F value) {
    T* out = static_cast<T*>(call.out) + row * call.out_channels + channel;
    const int64_t left = call.out_channels - channel;
    if (left >= Vec::W) {
        Vec::store(out, value);
    } else if (left > 0) {
        T whole[Vec::W];
        Vec::store(whole, value);
        __builtin_memcpy(out, whole, size_t(left) * sizeof(T));
    }
}

template <class Vec>
FOVEATE_INLINE void put(const foveate_linear& call, int64_t row, int64_t channel, typename Vec::F value) {
    if (call.bias) value = Vec::add(value, Vec::load(call.bias + channel));
    if (call.dtype == FOVEATE_FLOAT32) put_as<Vec, float>(call, row, channel, value);
    else put_as<Vec, bfloat16>(call, row, channel, value);
}

// Sums [blocks][rows][kBlock] of the blocks of output channels from ``first_block`` on.
template <class Vec>
void put_sums(const foveate_linear& call, const float* sums, int64_t first, int64_t rows, int64_t first_block,
              int64_t blocks) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t block = 0; block < blocks; ++block)
            for (int c = 0; c < kBlock; c += Vec::W)
                put<Vec>(call, first + row, (first_block + block) * kBlock + c,
                         Vec::load(sums + (block * rows + row) * kBlock + c));
}

template <class Isa>
struct DotLinear {
    using Vec = typename Isa::Vec;
    using I = typename Vec::I;
    using F = typename Vec::F;
    static constexpr int W = Vec::W;

    // ---- 8 bits ----

    static FOVEATE_INLINE Columns<Vec> columns(const foveate_linear& call, int64_t channel) {
        // Unsigned inputs are 128 too high each.
        return {Vec::load(call.scales + channel), Isa::template shift_left<7>(Vec::load_int(call.sums + channel)),
                channel};
    }

    // What the sums of products of one row stand for.
    template <int kPlanes>
    static FOVEATE_INLINE F scaled8(const Columns<Vec>& columns, float scale, I high, I low) {
        F value = Isa::to_float(Isa::sub(high, columns.bias));
        if (kPlanes == 2)
            value = Vec::fma(value, Vec::set(256.0f), Isa::to_float(Isa::sub(low, columns.bias)));
        return Vec::mul(value, Vec::mul(Vec::set(scale), columns.scale));
    }

    // kRows rows of kPlanes byte rows each, kVectors vectors of output channels from ``channel`` on.
    template <int kRows, int kPlanes, int kVectors>
    static void multiply8(const foveate_linear& call, const Activations& input, int64_t row, int64_t channel) {
        constexpr int kByteRows = kRows * kPlanes;
        const int64_t stride = input.stride;
        const uint8_t* a = input.bytes + row * kPlanes * stride;
        const int8_t* w[kVectors];
        for (int j = 0; j < kVectors; ++j) {
            const int64_t c = channel + j * W;
            w[j] = static_cast<const int8_t*>(call.weight) + c / kBlock * kBlock * stride + c % kBlock * 4;
        }
        I sums[kByteRows][kVectors];
#pragma GCC unroll 8
        for (int r = 0; r < kByteRows; ++r)
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j) sums[r][j] = Vec::set_int(0);
        for (int64_t k = 0; k < stride; k += 4) {
            if constexpr (kRows == 1)  // it waits for memory; a line is four inputs of a block
                for (int j = 0; j < kVectors; j += kBlock / W)
                    _mm_prefetch(reinterpret_cast<const char*>(w[j] + k * kBlock + kAhead), _MM_HINT_T0);
            typename Isa::Weights weights[kVectors];
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j) weights[j] = Isa::weights(w[j] + k * kBlock);
#pragma GCC unroll 8
            for (int r = 0; r < kByteRows; ++r) {
                const typename Isa::Inputs inputs = Isa::inputs(a + r * stride + k);
#pragma GCC unroll 8
                for (int j = 0; j < kVectors; ++j) sums[r][j] = Isa::dot(sums[r][j], inputs, weights[j]);
            }
        }
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) {
            const Columns<Vec> held = columns(call, channel + j * W);
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r)
                put<Vec>(call, row + r, held.channel,
                         scaled8<kPlanes>(held, input.scales[row + r], sums[r * kPlanes][j],
                                          sums[r * kPlanes + kPlanes - 1][j]));
        }
    }

    template <int kPlanes, int kVectors>
    static void rows8(const foveate_linear& call, const Activations& input, int64_t first, int64_t last,
                      int64_t channel) {
        constexpr int kMost = Isa::kRows / kPlanes;
        for (int64_t row = first; row < last; row += kMost) {
            switch (smaller<int64_t>(kMost, last - row)) {
                case 1: multiply8<1, kPlanes, kVectors>(call, input, row, channel); break;
                case 2: multiply8<(kMost < 2 ? kMost : 2), kPlanes, kVectors>(call, input, row, channel); break;
                case 3: multiply8<(kMost < 3 ? kMost : 3), kPlanes, kVectors>(call, input, row, channel); break;
                case 4: multiply8<(kMost < 4 ? kMost : 4), kPlanes, kVectors>(call, input, row, channel); break;
                case 5: multiply8<(kMost < 5 ? kMost : 5), kPlanes, kVectors>(call, input, row, channel); break;
                default: multiply8<kMost, kPlanes, kVectors>(call, input, row, channel);
            }
        }
    }

    template <int kPlanes>
    static void blocks8(const foveate_linear& call, const Activations& input, int64_t first, int64_t last,
                        int64_t channel, int64_t end) {
        for (; channel + Isa::kVectors * W <= end; channel += Isa::kVectors * W)
            rows8<kPlanes, Isa::kVectors>(call, input, first, last, channel);
        for (; channel < end; channel += W) rows8<kPlanes, 1>(call, input, first, last, channel);
    }

    // ---- 4 bits ----

    static constexpr int kPanel = 4;

    // Vectors of output channels at once, of a block each. Two share what is broadcast of the inputs, of which Zen 4 loads
    // one a cycle, as many as it multiplies; 8 lanes have no registers for it.
    static constexpr int kTogether = W == kBlock ? 2 : 1;

    // Like multiply8, for kRows rows of kPlanes planes each, and kVectors vectors of output channels from ``channel`` on.
    template <int kRows, int kPlanes, int kVectors>
    static void multiply4(const foveate_linear& call, const Activations& input, int64_t row, int64_t channel) {
        const int64_t groups = input.stride / kGroup, block = channel / kBlock, lane = channel % kBlock;
        // Rows of one plane lie side by side in a panel; those of two do not.
        const int64_t at = kPlanes == 1 ? input.at(row, 0) : row * groups;
        const int64_t to_row = kPlanes == 1 ? 1 : groups, to_group = kPlanes == 1 ? input.panel : 1;
        const uint8_t* a = input.bytes + at * kPlanes * kGroup;
        const float* worths = input.scales + at;  // of one plane
        const float* totals = input.group_sums + at;
        const uint8_t* w = static_cast<const uint8_t*>(call.weight) + block * groups * 256 + lane * 4;
        const uint16_t* steps = call.groups + block * groups * 2 * kBlock + lane;
        const int64_t next_w = groups * 256, next_steps = groups * 2 * kBlock;  // of the next block
        F sums[kRows][kVectors];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
            for (int j = 0; j < kVectors; ++j) sums[r][j] = Vec::zero();
        for (int64_t g = 0; g < groups; ++g, w += 256, steps += 2 * kBlock) {
            I levels[kRows][kPlanes][kVectors];
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
                for (int p = 0; p < kPlanes; ++p)
#pragma GCC unroll 2
                    for (int j = 0; j < kVectors; ++j) levels[r][p][j] = Vec::set_int(0);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                I first[kVectors], second[kVectors];
#pragma GCC unroll 2
                for (int j = 0; j < kVectors; ++j) {
                    const I both = Isa::load(w + j * next_w + i * 64);
                    first[j] = Isa::low_nibbles(both);
                    second[j] = Isa::high_nibbles(both);
                }
#pragma GCC unroll 8
                for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
                    for (int p = 0; p < kPlanes; ++p) {
                        const uint8_t* x = a + ((r * kPlanes + p) * to_row + g * to_group) * kGroup + i * 4;
#pragma GCC unroll 2
                        for (int j = 0; j < kVectors; ++j) levels[r][p][j] = Isa::dot_nibbles(levels[r][p][j], first[j], x);
#pragma GCC unroll 2
                        for (int j = 0; j < kVectors; ++j)
                            levels[r][p][j] = Isa::dot_nibbles(levels[r][p][j], second[j], x + 16);
                    }
            }
#pragma GCC unroll 2
            for (int j = 0; j < kVectors; ++j) {
                const uint16_t* held = steps + j * next_steps;
                const F step = Vec::load(held), zero = Vec::load(held + kBlock);
#pragma GCC unroll 8
                for (int r = 0; r < kRows; ++r) {
                    const int64_t place = r * to_row + g * to_group;
                    F& sum = sums[r][j];
                    if constexpr (kPlanes == 2) {
                        const I whole = Isa::add(Isa::template shift_left<8>(levels[r][0][j]), levels[r][1][j]);
                        sum = Vec::fma(Isa::to_float(whole), step, sum);
                    } else {
                        sum = Vec::fma(Isa::to_float(levels[r][0][j]), Vec::mul(step, Vec::set(worths[place])), sum);
                    }
                    sum = Vec::fma(Vec::set(totals[place]), zero, sum);
                }
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
            for (int j = 0; j < kVectors; ++j)
                put<Vec>(call, row + r, channel + j * W,
                         kPlanes == 2 ? Vec::mul(sums[r][j], Vec::set(input.scales[row + r])) : sums[r][j]);
    }

    template <int kPlanes, int kVectors>
    static void rows4(const foveate_linear& call, const Activations& input, int64_t first, int64_t last,
                      int64_t channel) {
        constexpr int kMost = Isa::kRows / kPlanes < kPanel ? Isa::kRows / kPlanes : kPanel;
        static_assert(kPlanes == 2 || kMost == kPanel);
        for (int64_t row = first; row < last; row += kMost) {
            switch (smaller<int64_t>(kMost, last - row)) {
                case 1: multiply4<1, kPlanes, kVectors>(call, input, row, channel); break;
                case 2: multiply4<(kMost < 2 ? kMost : 2), kPlanes, kVectors>(call, input, row, channel); break;
                case 3: multiply4<(kMost < 3 ? kMost : 3), kPlanes, kVectors>(call, input, row, channel); break;
                default: multiply4<kMost, kPlanes, kVectors>(call, input, row, channel);
            }
        }
    }

    template <int kPlanes>
    static void blocks4(const foveate_linear& call, const Activations& input, int64_t first, int64_t last,
                        int64_t channel, int64_t end) {
        for (; channel + kTogether * W <= end; channel += kTogether * W)
            rows4<kPlanes, kTogether>(call, input, first, last, channel);
        for (; channel < end; channel += W) rows4<kPlanes, 1>(call, input, first, last, channel);
    }

    static void multiply(const foveate_linear& call, const Activations& input, int64_t first, int64_t last,
                         int64_t first_block, int64_t last_block, void*) {
        int64_t channel = first_block * kBlock;
        const int64_t end = last_block * kBlock;
        if (call.weight_bits == 4) {
            if (input.planes == 1) blocks4<1>(call, input, first, last, channel, end);
            else blocks4<2>(call, input, first, last, channel, end);
            return;
        }
        if (input.planes == 1) blocks8<1>(call, input, first, last, channel, end);
        else blocks8<2>(call, input, first, last, channel, end);
    }

    // Rows of the 16 output channels of a block, whole cache lines at a time.
    template <class T>
    static void widen_as(const foveate_linear& call, int64_t block) {
        const int64_t depth = call.in_channels, groups = padded_to(depth, 2 * kGroup) / kGroup;
        const int channels = int(smaller<int64_t>(kBlock, call.out_channels - block * kBlock));
        const __m256i fours = _mm256_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112);
        for (int64_t g = 0; g * kGroup < depth; ++g) {
            const uint8_t* w = static_cast<const uint8_t*>(call.weight) + (block * groups + g) * 256;
            const uint16_t* steps = call.groups + (block * groups + g) * 2 * kBlock;
            alignas(64) uint8_t bytes[2][256];  // [8 fours of input channels][16 output channels][4]
            for (int i = 0; i < 256; i += 4 * W) {
                const I both = Isa::load(w + i);
                Isa::store(bytes[0] + i, Isa::low_nibbles(both));
                Isa::store(bytes[1] + i, Isa::high_nibbles(both));
            }
            for (int c = 0; c < channels; ++c) {
                alignas(32) uint8_t row[kGroup];
                const int* column = reinterpret_cast<const int*>(bytes[0]) + c;
                _mm256_store_si256(reinterpret_cast<__m256i*>(row), _mm256_i32gather_epi32(column, fours, 4));
                const F step = Vec::set(to_float(steps[c])), zero = Vec::set(to_float(steps[kBlock + c]));
                T* out = static_cast<T*>(call.out) + (block * kBlock + c) * depth + g * kGroup;
                const int64_t left = depth - g * kGroup;
                for (int i = 0; i < kGroup && i < left; i += W) {
                    const F value = Vec::fma(Isa::to_float(Isa::load_bytes(row + i)), step, zero);
                    if (left - i >= W) {
                        Vec::store(out + i, value);
                    } else {
                        T whole[W];
                        Vec::store(whole, value);
                        __builtin_memcpy(out + i, whole, size_t(left - i) * sizeof(T));
                    }
                }
            }
        }
    }

    static void widen(const foveate_linear& call, int64_t block) {
        if (call.dtype == FOVEATE_FLOAT32) widen_as<float>(call, block);
        else widen_as<bfloat16>(call, block);
    }

    static void nothing() {}
};

}  // namespace
