// AMX: eight tiles of up to 16 rows x 64 bytes, a set for each thread. Using what was not configured ends the process.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

struct EmulatedTiles {
    int rows[8] = {}, row_bytes[8] = {};
    bool configured = false;
    alignas(64) uint8_t data[8][16][64] = {};

    void require(bool right, const char* what) const {
        if (right) return;
        std::fprintf(stderr, "emulated AMX: %s\n", what);
        std::abort();
    }

    void load_config(const void* memory) {
        const uint8_t* config = static_cast<const uint8_t*>(memory);
        require(config[0] == 1 && config[1] == 0, "palette 1 and start row 0 are all there is");
        for (int tile = 0; tile < 8; ++tile) {
            uint16_t bytes;
            std::memcpy(&bytes, config + 16 + 2 * tile, sizeof(bytes));
            rows[tile] = config[48 + tile];
            row_bytes[tile] = bytes;
            require(rows[tile] <= 16 && row_bytes[tile] <= 64, "a tile larger than 16 rows of 64 bytes");
        }
        std::memset(data, 0, sizeof(data));
        configured = true;
    }
    void release() {
        configured = false;
        std::memset(data, 0, sizeof(data));
    }
    void zero(int tile) {
        require(configured && rows[tile], "a tile that was not configured");
        std::memset(data[tile], 0, sizeof(data[tile]));
    }
    void load(int tile, const void* memory, int64_t stride) {
        zero(tile);
        for (int m = 0; m < rows[tile]; ++m)
            std::memcpy(data[tile][m], static_cast<const char*>(memory) + m * stride, size_t(row_bytes[tile]));
    }
    void store(int tile, void* memory, int64_t stride) const {
        require(configured && rows[tile], "a tile that was not configured");
        for (int m = 0; m < rows[tile]; ++m)
            std::memcpy(static_cast<char*>(memory) + m * stride, data[tile][m], size_t(row_bytes[tile]));
    }

    // Adds the products of A's rows and B, whose rows hold four bytes of each column, to C; ``Dot`` multiplies four bytes.
    template <class Sum, class Dot>
    void multiply(int c, int a, int b, Dot dot) {
        require(configured && rows[a] == rows[c] && row_bytes[a] == 4 * rows[b] && row_bytes[b] == row_bytes[c],
                "shapes that do not fit");
        for (int m = 0; m < rows[c]; ++m) {
            Sum sums[16];
            std::memcpy(sums, data[c][m], sizeof(sums));
            for (int k = 0; k < rows[b]; ++k)
                for (int n = 0; n < row_bytes[c] / 4; ++n) sums[n] = dot(sums[n], data[a][m] + 4 * k, data[b][k] + 4 * n);
            std::memcpy(data[c][m], sums, sizeof(sums));
        }
    }
};

inline thread_local EmulatedTiles emulated_tiles;

inline float emulated_bfloat16_at(const uint8_t* p) {
    const uint32_t bits = uint32_t(p[0]) << 16 | uint32_t(p[1]) << 24;
    float result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
}

inline float emulated_dot_bfloat16(float sum, const uint8_t* a, const uint8_t* b) {
    sum += emulated_bfloat16_at(a) * emulated_bfloat16_at(b);
    return sum + emulated_bfloat16_at(a + 2) * emulated_bfloat16_at(b + 2);
}

template <class A, class B>
inline int32_t emulated_dot_bytes(int32_t sum, const uint8_t* a, const uint8_t* b) {
    for (int i = 0; i < 4; ++i) sum += int32_t(A(a[i])) * int32_t(B(b[i]));
    return sum;
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#undef _tile_dpbusd
#define _tile_loadconfig(memory) emulated_tiles.load_config(memory)
#define _tile_release() emulated_tiles.release()
#define _tile_zero(tile) emulated_tiles.zero(tile)
#define _tile_loadd(tile, memory, stride) emulated_tiles.load(tile, memory, stride)
#define _tile_stored(tile, memory, stride) emulated_tiles.store(tile, memory, stride)
#define _tile_dpbf16ps(c, a, b) emulated_tiles.multiply<float>(c, a, b, emulated_dot_bfloat16)
#define _tile_dpbssd(c, a, b) emulated_tiles.multiply<int32_t>(c, a, b, emulated_dot_bytes<int8_t, int8_t>)
#define _tile_dpbusd(c, a, b) emulated_tiles.multiply<int32_t>(c, a, b, emulated_dot_bytes<uint8_t, int8_t>)
