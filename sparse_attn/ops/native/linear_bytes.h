// Linear layers of 4-bit weights and 8-bit inputs for many rows on VNNI, for one instruction set ``Isa``.
//
// Weights of a piece become bytes of one unit per output channel, zero and all, so a group's sum is scaled by its input alone:
// of Zen 4's multipliers that takes 8 slots to 64 products, where a step and a zero of its own took 24. The unit is a 127th of
// the largest weight of the channel's piece, which adds 5 % to what 4 bits cost in squared error (a 1.5B model's weights).
#pragma once

#include "linear_dot.h"

namespace {

template <class Isa>
struct ByteLinear {
    using Few = DotLinear<Isa>;
    using Vec = typename Isa::Vec;
    using I = typename Vec::I;
    using F = typename Vec::F;
    // GCC drops the attribute of an alias by "using".
    typedef uint16_t Words __attribute__((vector_size(sizeof(I))));
    typedef uint32_t Longs __attribute__((vector_size(sizeof(I))));
    static_assert(sizeof(Words) == sizeof(I) && sizeof(Longs) == sizeof(I));
    static constexpr int W = Vec::W;
    static constexpr int kPanel = Few::kPanel;
    static_assert(kPanel == 4);
    static constexpr int kVectors = 2;         // of output channels at once: two blocks, or halves of one
    static constexpr int kStep = 4 * W;        // bytes of a vector
    static constexpr int64_t kGroups = 16;     // of a piece: its weights, up to 16 KiB, and a panel fit L1
    static constexpr int64_t kLeastRows = 64;  // of a call; unpacking costs as much as it saves of some 20
    static constexpr float kOffset = 128.0f;   // of the bytes, which are unsigned
    static constexpr int64_t kShared = kGroups * 8 * kVectors * kStep;
    // Scratch per row, of which an item gets at least 32: its sums, and a share of the bytes.
    static constexpr int64_t kRowBytes = kMostChannels * 4 + kShared / 32;

    template <class To, class From>
    static FOVEATE_INLINE To bits(From from) {
        To to;
        __builtin_memcpy(&to, &from, sizeof(to));
        return to;
    }

    // Each lane's number, rounded, as two words.
    static FOVEATE_INLINE Words twice(F numbers) {
        const Longs low = bits<Longs>(Isa::to_int(numbers)) & 0xffff;
        return bits<Words>(low | low << 16);
    }

    // ``groups`` groups of W output channels as bytes [groups][8][kHeld][W][4], of which these are one of kHeld vectors.
    // Returns the unit of each channel. See Int4Weight.as_bytes in patches/linear_weights.py.
    template <int kHeld>
    static F unpack(const uint8_t* weights, const uint16_t* steps, int64_t groups, uint8_t* to) {
        F top = Vec::zero(), broken = top;
        for (int64_t g = 0; g < groups; ++g) {
            const F step = Vec::load(steps + g * 2 * kBlock), zero = Vec::load(steps + (g * 2 + 1) * kBlock);
            const F end = Vec::fma(step, Vec::set(15.0f), zero), none = Vec::zero();
            top = Vec::max(top, Vec::max(Vec::max(zero, Vec::sub(none, zero)), Vec::max(end, Vec::sub(none, end))));
            broken = Vec::add(broken, Vec::sub(end, end));  // NaN of what is not finite
        }
        const F inverse = Vec::div(Vec::set(127.0f * 256.0f), Vec::max(top, Vec::set(0x1p-100f)));
        for (int64_t g = 0; g < groups; ++g) {
            const Words step = twice(Vec::mul(Vec::load(steps + g * 2 * kBlock), inverse));
            const Words zero = twice(Vec::mul(Vec::load(steps + (g * 2 + 1) * kBlock), inverse)) + uint16_t(kOffset * 256 + 128);
            for (int i = 0; i < 4; ++i) {
                const Words both = bits<Words>(Isa::load(weights + g * 256 + i * 64));
                const Words low = (both & 15) * step + zero, low_odd = (both >> 8 & 15) * step + zero;
                const Words high = (both >> 4 & 15) * step + zero, high_odd = (both >> 12) * step + zero;
                Isa::store(to + (g * 8 + i) * kHeld * kStep, bits<I>(low >> 8 | (low_odd & 0xff00)));
                Isa::store(to + (g * 8 + i + 4) * kHeld * kStep, bits<I>(high >> 8 | (high_odd & 0xff00)));
            }
        }
        return Vec::add(Vec::div(top, Vec::set(127.0f)), broken);
    }

    // Adds to the sums of kRows rows, [kRows][kBlock] for each vector of output channels, ``next`` from one to another. Not
    // inlined: in a larger function GCC spills the sums.
    template <int kRows, int kHeld>
    __attribute__((noinline)) static void add_groups(const Activations& input, int64_t place, const uint8_t* weights,
                                                     int64_t groups, const F (&units)[kHeld], float* to, int64_t next) {
        const uint8_t* a = input.bytes + place * kGroup;
        const float* worths = input.scales + place;
        F out[kRows][kHeld];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
            for (int j = 0; j < kHeld; ++j) out[r][j] = Vec::zero();
        for (int64_t g = 0; g < groups; ++g, a += kPanel * kGroup, worths += kPanel) {
            I sums[kRows][kHeld];
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
                for (int j = 0; j < kHeld; ++j) sums[r][j] = Vec::set_int(0);
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i, weights += kHeld * kStep) {
                I held[kHeld];
#pragma GCC unroll 2
                for (int j = 0; j < kHeld; ++j) held[j] = Isa::load(weights + j * kStep);
#pragma GCC unroll 4
                for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
                    for (int j = 0; j < kHeld; ++j)
                        sums[r][j] = Isa::dot_nibbles(sums[r][j], held[j], a + r * kGroup + i * 4);
            }
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
                for (int j = 0; j < kHeld; ++j)
                    out[r][j] = Vec::fma(Isa::to_float(sums[r][j]), Vec::set(worths[r]), out[r][j]);
        }
        __m128 totals = _mm_setzero_ps();
        for (int64_t g = 0; g < groups; ++g) totals = _mm_add_ps(totals, _mm_loadu_ps(input.group_sums + place + g * kPanel));
        float offsets[kPanel];
        _mm_storeu_ps(offsets, _mm_mul_ps(totals, _mm_set1_ps(kOffset)));
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
            for (int j = 0; j < kHeld; ++j) {
                float* sum = to + r * kBlock + j * next;
                const F value = Vec::sub(out[r][j], Vec::set(offsets[r]));
                Vec::store(sum, Vec::fma(value, units[j], Vec::load(sum)));
            }
    }

    // The same for ``rows`` rows from ``row`` on and kHeld vectors of output channels from ``channel`` on, which are unpacked
    // to ``bytes``.
    template <int kHeld>
    static void add_piece(const foveate_linear& call, const Activations& input, int64_t row, int64_t rows, int64_t group,
                          int64_t held, int64_t channel, uint8_t* bytes, float* to, int64_t next) {
        const int64_t groups = input.stride / kGroup;
        F units[kHeld];
        for (int j = 0; j < kHeld; ++j) {
            const int64_t c = channel + j * W, at = c / kBlock * groups + group, lane = c % kBlock;
            units[j] = unpack<kHeld>(static_cast<const uint8_t*>(call.weight) + at * 256 + lane * 4,
                                     call.groups + at * 2 * kBlock + lane, held, bytes + j * kStep);
        }
        for (int64_t end = row + rows; row < end; row += kPanel, to += kPanel * kBlock) {
            const int64_t place = input.at(row, group);
            switch (smaller<int64_t>(kPanel, end - row)) {
                case 1: add_groups<1, kHeld>(input, place, bytes, held, units, to, next); break;
                case 2: add_groups<2, kHeld>(input, place, bytes, held, units, to, next); break;
                case 3: add_groups<3, kHeld>(input, place, bytes, held, units, to, next); break;
                default: add_groups<kPanel, kHeld>(input, place, bytes, held, units, to, next);
            }
        }
    }

    // As DotLinear::multiply, for calls of at least kLeastRows rows.
    static void multiply_many(const foveate_linear& call, const Activations& input, int64_t first, int64_t last,
                              int64_t first_block, int64_t last_block, void* scratch) {
        const int64_t rows = last - first, blocks = last_block - first_block, groups = input.stride / kGroup;
        float* sums = static_cast<float*>(scratch);  // [blocks][rows][kBlock]
        uint8_t* bytes = reinterpret_cast<uint8_t*>(sums + blocks * rows * kBlock);
        const int64_t next = W == kBlock ? rows * kBlock : W;
        __builtin_memset(sums, 0, size_t(blocks * rows * kBlock) * 4);
        for (int64_t at = 0; at < groups; at += kGroups) {
            const int64_t held = smaller(kGroups, groups - at);
            for (int64_t c = 0; c < blocks * kBlock; c += kVectors * W) {
                float* to = sums + c * rows;
                const int64_t channel = first_block * kBlock + c;
                if (c + kVectors * W <= blocks * kBlock)
                    add_piece<kVectors>(call, input, first, rows, at, held, channel, bytes, to, next);
                else add_piece<1>(call, input, first, rows, at, held, channel, bytes, to, next);
            }
        }
        put_sums<Vec>(call, sums, first, rows, first_block, blocks);
    }

    static void multiply(const foveate_linear& call, const Activations& input, int64_t first, int64_t last,
                         int64_t first_block, int64_t last_block, void* scratch) {
        const bool many = call.as_bytes && input.planes == 1 && call.rows >= kLeastRows;
        (many ? multiply_many : Few::multiply)(call, input, first, last, first_block, last_block, scratch);
    }

    static constexpr LinearKernels table() {
        return {LinearInput<Isa>::quantize, multiply, Few::widen, kRowBytes, 1, kPanel, Few::nothing, Few::nothing};
    }
};

}  // namespace
