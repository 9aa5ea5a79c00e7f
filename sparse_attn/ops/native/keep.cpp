// What is read beside a selection, added to it, and what it reads, counted; on the caller's thread, since both pass once
// over the selection.
#include <algorithm>

#include "pairs.h"
#include "pick.h"

extern "C" {

int32_t foveate_selection_size(void) { return int32_t(sizeof(foveate_selection)); }

int32_t foveate_selection_keep(const foveate_selection* call_pointer) {
    const foveate_selection& call = *call_pointer;
    for (int64_t i = 0; i < call.rows * call.kinds; ++i) {
        const int64_t r = i / call.kinds;
        const int32_t* chosen = call.indices + i * call.width;
        const int32_t* const end = chosen + call.width;
        int32_t* out = call.kept + i * call.kept_width;
        int64_t n = 0;
        int32_t next = 0;  // the least unit that is not there yet
        const auto run = [&](int32_t first, int32_t last) {
            for (int32_t unit = std::max(first, next); unit <= last; ++unit) out[n++] = unit;
            next = std::max(next, last + 1);
        };
        run(0, call.sinks[r] - 1);
        for (; chosen < end && *chosen < call.first[r]; ++chosen) run(*chosen, *chosen);
        run(call.first[r], call.last[r]);
        for (; chosen < end; ++chosen)
            if (*chosen >= 0) run(*chosen, *chosen);
        call.counts[i] = int32_t(n);
        std::fill(out + n, out + call.kept_width, -1);
    }
    return 0;
}

int32_t foveate_selection_pairs(const foveate_selection* call_pointer) {
    const foveate_selection& call = *call_pointer;
    const int64_t far = std::max(call.farthest, call.nearest);
    for (int64_t i = 0; i < call.rows * call.kinds; ++i) {
        const int64_t r = i / call.kinds, count = call.tile_count[r], tile_end = call.tile_position[r] + count;
        const int64_t pairs = pairs_of(call.indices + i * call.width, call.width, call.granularity, count,
                                       tile_end - call.nearest, tile_end - far);
        call.pairs[call.tile_sequence[r]] += double(pairs);
    }
    return 0;
}
}
