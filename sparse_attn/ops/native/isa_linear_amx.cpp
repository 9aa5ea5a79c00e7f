// Many rows of an 8-bit layer on tiles: A = 16 rows x 64 channels as they lie, B = a block of 16 output channels x 64,
// packed so, C = 16 x 16 sums. Two A and two B tiles make four C, which is all that eight tiles allow.
//
// Input channels are taken in chunks, so that both B columns of a chunk stay in L1 while the rows pass by.
#include "linear_dot.h"
#include "linear_lanes.h"
#include "tiles.h"

namespace {

using Dot = DotLinear<Lanes16>;

constexpr int kTileBytes = 1024;
constexpr int kDepth = 64;  // input channels of a tile
constexpr int kMostDepth = 640;  // of a chunk: two blocks of it and the rows' part fill L1

// Two tiles of byte rows: rows m..m+31, or both planes of rows m..m+15.
struct RowPair {
    const uint8_t* first;
    const uint8_t* second;
    int64_t stride;
};

RowPair pair_of(const Activations& input, int64_t row) {
    const uint8_t* at = input.bytes + row * input.planes * input.stride;
    if (input.planes == 2) return {at, at + input.stride, 2 * input.stride};
    return {at, at + 16 * input.stride, input.stride};
}

// Adds a chunk of ``steps`` tiles to the four tiles of sums.
FOVEATE_INLINE void multiply_tiles(const RowPair& rows, int64_t from, int64_t steps, const int8_t* w0, const int8_t* w1,
                                   int32_t* sums) {
    const bool begins = from == 0;
    if (begins) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + 256, 64);
        _tile_loadd(2, sums + 512, 64);
        _tile_loadd(3, sums + 768, 64);
    }
    for (int64_t s = from; s < from + steps; ++s) {
        _tile_loadd(4, rows.first + s * kDepth, rows.stride);
        _tile_loadd(6, w0 + s * kTileBytes, 64);
        _tile_dpbusd(0, 4, 6);
        _tile_loadd(7, w1 + s * kTileBytes, 64);
        _tile_dpbusd(1, 4, 7);
        _tile_loadd(5, rows.second + s * kDepth, rows.stride);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
}

template <class T>
FOVEATE_INLINE void store(T* out, __m512 value);
template <>
FOVEATE_INLINE void store(float* out, __m512 value) { _mm512_storeu_ps(out, value); }
template <>
FOVEATE_INLINE void store(bfloat16* out, __m512 value) {
    const __m256bh rounded = _mm512_cvtneps_pbh(value);
    __builtin_memcpy(out, &rounded, sizeof(rounded));
}

// Writes what the tiles of sums of ``rows`` rows and one block of output channels stand for. With one plane, rows 16
// on are in the second pair of tiles; with two, that pair is the low plane.
template <class T, int kPlanes>
void finish(const foveate_linear& call, const Activations& input, int64_t row, int rows, int64_t channel,
            const int32_t* sums) {
    const Columns<Vec16> held = Dot::columns(call, channel);
    const __m512 bias = call.bias ? _mm512_loadu_ps(call.bias + channel) : _mm512_setzero_ps();
    T* out = static_cast<T*>(call.out) + row * call.out_channels + channel;
    const float* scales = input.scales + row;
    const bool whole = channel + kBlock <= call.out_channels;
    for (int r = 0; r < rows; ++r, out += call.out_channels) {
        const int32_t* high = sums + r / 16 * 512 + r % 16 * 16;
        const __m512i low = kPlanes == 2 ? Vec16::load_int(high + 512) : _mm512_setzero_si512();
        const __m512 value =
            _mm512_add_ps(Dot::template scaled8<kPlanes>(held, scales[r], Vec16::load_int(high), low), bias);
        if (whole) store(out, value);
        else put_as<Vec16, T>(call, row + r, channel, value);
    }
}

using Finish = void (*)(const foveate_linear&, const Activations&, int64_t, int, int64_t, const int32_t*);

Finish finish_of(const foveate_linear& call, int planes) {
    if (call.dtype == FOVEATE_FLOAT32) return planes == 1 ? finish<float, 1> : finish<float, 2>;
    return planes == 1 ? finish<bfloat16, 1> : finish<bfloat16, 2>;
}

void multiply(const foveate_linear& call, const Activations& input, int64_t first, int64_t last, int64_t first_block,
              int64_t last_block, void* scratch) {
    int32_t* sums = static_cast<int32_t*>(scratch);
    const int64_t steps = input.stride / kDepth, rows = 32 / input.planes;
    const int64_t chunks = (input.stride + kMostDepth - 1) / kMostDepth;
    const int8_t* weight = static_cast<const int8_t*>(call.weight);
    const Finish write = finish_of(call, input.planes);
    for (int64_t block = first_block; block < last_block; block += 2) {
        const int columns = int(smaller<int64_t>(2, last_block - block));
        const int8_t* w0 = weight + block * kBlock * input.stride;
        const int8_t* w1 = w0 + (columns - 1) * kBlock * input.stride;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int64_t from = steps * chunk / chunks, to = steps * (chunk + 1) / chunks;
            int32_t* at = sums;
            for (int64_t row = first; row < last; row += rows, at += 1024) {
                multiply_tiles(pair_of(input, row), from, to - from, w0, w1, at);
                if (chunk + 1 < chunks) continue;
                const int held = int(smaller<int64_t>(last - row, rows));
                for (int j = 0; j < columns; ++j) write(call, input, row, held, (block + j) * kBlock, at + j * 256);
            }
        }
    }
}

}  // namespace

// 4 KiB of sums per 16 rows at least; below 8 rows dot products are faster.
constexpr LinearKernels kLinearAmx = {LinearInput<Lanes16>::quantize, multiply, Dot::widen, 256, 8, 1, configure_tiles,
                                      release_tiles};
