// How many pairs of a query and a key a row of a selection stands for.
#pragma once

#include <algorithm>
#include <cstdint>

namespace {

// Pairs of a tile's ``count`` queries and the keys up to the one that lies ``x`` before the tile's end.
inline int64_t pairs_up_to(int64_t x, int64_t count) {
    if (x <= 0) return 0;
    const int64_t ramp = std::min(x, count);
    return ramp * (ramp + 1) / 2 + (x - ramp) * count;
}

// Pairs of a tile's ``count`` queries and the keys of its units; entries below 0 are none. ``near_end`` and ``far_end``
// are the tile's end less the distances at which keys begin and cease to be visible.
inline int64_t pairs_of(const int32_t* units, int64_t width, int64_t size, int64_t count, int64_t near_end,
                        int64_t far_end) {
    int64_t pairs = 0;
    if (size == 1 && count == 1 && far_end <= 0) {  // one query and tokens: most of decode
        for (int64_t k = 0; k < width; ++k) pairs += (units[k] >= 0) & (units[k] < near_end);
        return pairs;
    }
    for (int64_t k = 0; k < width; ++k) {
        if (units[k] < 0) continue;
        const int64_t near = near_end - units[k] * size, far = far_end - units[k] * size;
        pairs += pairs_up_to(near, count) - pairs_up_to(near - size, count);
        pairs -= pairs_up_to(far, count) - pairs_up_to(far - size, count);
    }
    return pairs;
}

}  // namespace
