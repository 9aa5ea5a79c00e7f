// The C interface of the quantised linear layers, and the functions that each instruction set offers for them.
//
// Weights lie in blocks of 16 output channels, four input channels side by side, which is how dot product
// instructions and tiles both want them; one packing serves one row and many:
//   8 bit  [N/16][K/4][16][4] int8, K padded to 64 by zeros;
//   4 bit  [N/16][K/32][4][16][4] uint8: the low nibbles hold the first 16 channels of a group, the high ones the rest.
// Activations are quantised when a call begins: to 8 bit, per row, or for weights of 4 bit per row and group of 32; or
// for weight-only layers to 16 bit per row, in two planes of 8, which costs less than widening the weights and loses less
// than bfloat16 does.
//
// Letters: M rows (tokens), K input channels, N output channels.
#pragma once

#include "kernels.h"

extern "C" {

// In order of preference: a later one is faster where the CPU has it.
enum foveate_linear_isa : int32_t {
    FOVEATE_LINEAR_AVX2 = 0,     // dot products put together from 16-bit ones
    FOVEATE_LINEAR_AVXVNNI = 1,  // 8-bit dot products, 8 lanes
    FOVEATE_LINEAR_AVX512VNNI = 2,
    FOVEATE_LINEAR_AMX = 3,      // 8-bit tiles for many rows
    FOVEATE_LINEAR_NUM_ISAS = 4,
};

// One layer and one input. Nothing here is owned or changed but ``out``.
struct foveate_linear {
    const void* input;        // [M, K], rows ``input_stride`` elements apart
    void* out;                // [M, N], dense
    const void* weight;       // packed
    const float* scales;      // 8 bit: [N padded to 16]
    const int32_t* sums;      // 8 bit: [N padded to 16] sum of the quantised weights of each output channel
    const uint16_t* groups;   // 4 bit: [N/16][K/32][2][16] bfloat16: a step, and what 0 stands for
    const float* bias;        // [N padded to 16], or null
    int64_t input_stride;
    int64_t rows;
    int64_t in_channels;
    int64_t out_channels;
    int32_t weight_bits;      // 8 or 4
    int32_t activation_bits;  // 8 or 16
    int32_t dtype;            // of input and out
    int32_t isa;
    int32_t num_threads;
    int32_t as_bytes;         // 4 bit: many rows may multiply bytes of one unit per output channel and piece
};

// Was this instruction set compiled in, and do this CPU and its kernel have it?
FOVEATE_API int32_t foveate_linear_has_isa(int32_t isa);

// out = input @ weight.T + bias. 0, or 1 when no memory was left.
FOVEATE_API int32_t foveate_linear_run(const foveate_linear* call);

// Only ``weight``, ``groups``, the channels, ``isa`` and ``num_threads`` are read: the weights of a 4-bit layer to
// ``out`` [N, K] of ``dtype``.
FOVEATE_API int32_t foveate_linear_widen(const foveate_linear* call);

FOVEATE_API int32_t foveate_linear_size(void);
}

constexpr int64_t kMostChannels = 256;  // output channels of a work item

static inline int64_t padded_to(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// The quantised input of a call: ``planes`` rows of bytes per row, high before low. For 8 bit behind weights of 4 those of
// ``panel`` rows lie side by side, group by group: [M/panel][K/32][panel] times 32 bytes, a scale, and a sum. Elsewhere
// ``panel`` is 1.
struct Activations {
    uint8_t* bytes;
    int64_t stride;     // bytes from one plane of a row to the next
    int planes;
    int64_t panel;
    float* scales;      // [M], or [M/panel][K/32][panel] for 8 bit behind weights of 4
    float* group_sums;  // 4 bit: likewise, sums of the quantised input; for 8 bit times its scale

    // Where a group of a row lies.
    int64_t at(int64_t row, int64_t group) const {
        return (row / panel * (stride / 32) + group) * panel + row % panel;
    }
};

struct LinearKernels {
    void (*quantize)(const foveate_linear& call, const Activations& to, int64_t first, int64_t last);
    // Rows first..last of the output channels of blocks first_block..last_block.
    void (*multiply)(const foveate_linear& call, const Activations& input, int64_t first, int64_t last,
                     int64_t first_block, int64_t last_block, void* scratch);
    void (*widen)(const foveate_linear& call, int64_t block);
    int64_t row_scratch;  // bytes of scratch per row of an item
    int64_t least_rows;   // rows x planes from which on these kernels are worth their setup
    int64_t panel;        // of calls of more than one row, with weights of 4 bits and inputs of 8
    void (*begin)();
    void (*end)();
};

extern const LinearKernels kLinearAvx2;
extern const LinearKernels kLinearAvxVnni;
extern const LinearKernels kLinearAvx512Vnni;
extern const LinearKernels kLinearAmx;
