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
constexpr int kDepth = 64;       // input channels of a tile
constexpr int kMostDepth = 1024;  // of a chunk

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

// Writes what four tiles of sums stand for; ``columns`` is 1 or 2 blocks of output channels.
void finish(const foveate_linear& call, const Activations& input, int64_t row, int64_t last, int64_t channel,
            int columns, const int32_t* sums) {
    const int rows = int(smaller<int64_t>(last - row, 32 / input.planes));
    for (int r = 0; r < rows; ++r)
        for (int j = 0; j < columns; ++j) {
            // One plane: rows 16 on are in the second pair of tiles. Two: the second pair is the low plane.
            const int32_t* high = sums + (r / 16 * 2 + j) * 256 + r % 16 * 16;
            const int32_t* low = high + (input.planes - 1) * 512;
            const int64_t c = channel + j * kBlock;
            put<Vec16>(call, row + r, c,
                       Dot::scaled8(call, input, row + r, c, Vec16::load_int(high), Vec16::load_int(low)));
        }
}

void multiply(const foveate_linear& call, const Activations& input, int64_t first, int64_t last, int64_t first_block,
              int64_t last_block, void* scratch) {
    if (call.weight_bits == 4) return Dot::multiply(call, input, first, last, first_block, last_block, scratch);
    int32_t* sums = static_cast<int32_t*>(scratch);
    const int64_t steps = input.stride / kDepth, rows = 32 / input.planes;
    const int64_t chunks = (input.stride + kMostDepth - 1) / kMostDepth;
    const int8_t* weight = static_cast<const int8_t*>(call.weight);
    for (int64_t block = first_block; block < last_block; block += 2) {
        const int columns = int(smaller<int64_t>(2, last_block - block));
        const int8_t* w0 = weight + block * kBlock * input.stride;
        const int8_t* w1 = w0 + (columns - 1) * kBlock * input.stride;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int64_t from = steps * chunk / chunks, to = steps * (chunk + 1) / chunks;
            int32_t* at = sums;
            for (int64_t row = first; row < last; row += rows, at += 1024) {
                multiply_tiles(pair_of(input, row), from, to - from, w0, w1, at);
                if (chunk + 1 == chunks) finish(call, input, row, last, block * kBlock, columns, at);
            }
        }
    }
}

void release_tiles() { _tile_release(); }

}  // namespace

// 4 KiB of sums per 16 rows at least; below 8 rows dot products are faster.
const LinearKernels kLinearAmx = {Dot::quantize, multiply, Dot::widen, 256, 8, configure_tiles, release_tiles};
