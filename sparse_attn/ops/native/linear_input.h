// Rounds the rows of a linear layer's input when a call begins, for one instruction set ``Isa``.
#pragma once

#include "linear.h"
#include "simd.h"

namespace {

constexpr int kGroup = 32;  // input channels that share a step in 4 bits
// Levels of 16 bits: a high byte of at most 127 and a low one, both signed.
constexpr float kLevels8 = 127.0f, kLevels16 = 32512.0f;

// What a level is worth, and how many there are to 1.
struct LevelScale {
    float worth, steps;
    FOVEATE_INLINE LevelScale(float largest, float levels) {
        const bool finite = largest < kInfinity;
        // What is too small to be divided by counts as zero.
        steps = finite && levels / largest < kInfinity ? levels / largest : 0.0f;
        worth = finite ? largest / levels : __builtin_nanf("");
    }
};

template <class Isa>
struct LinearInput {
    using Vec = typename Isa::Vec;
    using I = typename Vec::I;
    static constexpr int W = Vec::W;
    static constexpr int kStep = 4 * W;  // values that are stored at once; rows of bytes are padded to that

    // ``kStep`` values of a row of ``channels`` from ``k`` on; those behind its end, by way of ``room``, are zero.
    template <class T>
    static FOVEATE_INLINE const T* at(const T* x, int64_t k, int64_t channels, T* room) {
        if (k + kStep <= channels) return x + k;
        const int64_t held = larger<int64_t>(0, channels - k);
        __builtin_memset(room, 0, kStep * sizeof(T));
        __builtin_memcpy(room, x + k, size_t(held) * sizeof(T));
        return room;
    }

    // One scale for all of a row.
    template <class T>
    static void quantize_row(const foveate_linear& call, const Activations& to, int64_t row, const T* x) {
        uint8_t* bytes = to.bytes + row * to.planes * to.stride;
        const int64_t channels = call.in_channels, whole = channels / W * W;
        // As integers, so that NaN is the largest.
        I most = Vec::set_int(0);
        for (int64_t k = 0; k < whole; k += W) most = Isa::larger_magnitude(most, Vec::load(x + k));
        if (whole < channels) {
            float rest[W] = {};
            for (int64_t k = whole; k < channels; ++k) rest[k - whole] = to_float(x[k]);
            most = Isa::larger_magnitude(most, Vec::load(rest));
        }
        const LevelScale scale(Isa::largest(most), to.planes == 1 ? kLevels8 : kLevels16);
        to.scales[row] = scale.worth;
        T room[kStep];
        for (int64_t k = 0; k < to.stride; k += kStep) {
            const T* from = at(x, k, channels, room);
            I high[4], low[4];
            for (int i = 0; i < 4; ++i) low[i] = Isa::to_int(Vec::mul(Vec::load(from + i * W), Vec::set(scale.steps)));
            if (to.planes == 1) {
                Isa::store_bytes(bytes + k, low, true);
                continue;
            }
            for (int i = 0; i < 4; ++i) {
                high[i] = Isa::template shift_right<8>(Isa::add(low[i], Vec::set_int(128)));
                low[i] = Isa::sub(low[i], Isa::template shift_left<8>(high[i]));
            }
            Isa::store_bytes(bytes + k, high, call.weight_bits == 8);
            Isa::store_bytes(bytes + to.stride + k, low, call.weight_bits == 8);
        }
        if (call.weight_bits == 8) return;
        float* sums = to.group_sums + row * (to.stride / kGroup);
        for (int64_t group = 0; group < to.stride / kGroup; ++group) {
            int32_t sum = 0;
            const int8_t* high = reinterpret_cast<const int8_t*>(bytes) + group * kGroup;
            for (int i = 0; i < kGroup; ++i) sum += 256 * high[i] + high[to.stride + i];
            sums[group] = float(sum);
        }
    }

    // One scale for each group of a row, as weights of 4 bits have; signed bytes.
    template <class T>
    static void quantize_groups(const foveate_linear& call, const Activations& to, int64_t row, const T* x) {
        constexpr int kVectors = kGroup / W;
        int64_t place = to.at(row, 0);
        const int64_t panel = to.panel;
        T room[kStep];
        for (int64_t k = 0; k < to.stride; k += kStep) {
            const T* from = at(x, k, call.in_channels, room);
            I levels[4];
            uint8_t bytes[kStep];
            float worths[kStep / kGroup], totals[kStep / kGroup];
            for (int i = 0; i < kStep / kGroup; ++i) {
                const int first = i * kVectors;
                I most = Vec::set_int(0), sum = most;
                for (int j = first; j < first + kVectors; ++j) most = Isa::larger_magnitude(most, Vec::load(from + j * W));
                const LevelScale scale(Isa::largest(most), kLevels8);
                for (int j = first; j < first + kVectors; ++j) {
                    levels[j] = Isa::to_int(Vec::mul(Vec::load(from + j * W), Vec::set(scale.steps)));
                    sum = Isa::add(sum, levels[j]);
                }
                worths[i] = scale.worth;
                totals[i] = scale.worth * Vec::sum(Isa::to_float(sum));
            }
            Isa::store_bytes(bytes, levels, false);
            for (int i = 0; i < kStep / kGroup; ++i, place += panel) {
                __builtin_memcpy(to.bytes + place * kGroup, bytes + i * kGroup, kGroup);
                to.scales[place] = worths[i];
                to.group_sums[place] = totals[i];
            }
        }
    }

    template <class T>
    static void quantize_as(const foveate_linear& call, const Activations& to, int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const T* x = static_cast<const T*>(call.input) + row * call.input_stride;
            if (call.weight_bits == 4 && to.planes == 1) quantize_groups(call, to, row, x);
            else quantize_row(call, to, row, x);
        }
    }

    static void quantize(const foveate_linear& call, const Activations& to, int64_t first, int64_t last) {
        if (call.dtype == FOVEATE_FLOAT32) quantize_as<float>(call, to, first, last);
        else quantize_as<bfloat16>(call, to, first, last);
    }
};

}  // namespace
