// Choosing the best by their scores: a row of scores is an item.
#include "pick.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <new>
#include <vector>

#include "runtime.h"

namespace {

// Score and place in one number, no two of which are equal: the larger is chosen first.
uint64_t rank(float score, int64_t place, bool higher_ties) {
    if (score != score) score = __builtin_nanf("");
    score += 0.0f;
    int32_t bits;
    std::memcpy(&bits, &score, 4);
    const uint32_t ordered = uint32_t(bits ^ ((bits >> 31) & 0x7fffffff)) ^ 0x80000000u;
    return uint64_t(ordered) << 32 | (higher_ties ? uint32_t(place) : ~uint32_t(place));
}

struct Memory {
    std::vector<uint64_t> ranks, ordered;
    std::vector<int64_t> taken;
};

// Fills the rows of a call by ``row(call, row number, scores, indices, memory)``, which returns how many it chose.
using ChooseRow = int64_t (*)(const foveate_pick& call, int64_t r, const float* scores, int32_t* indices, Memory& memory);

int32_t each_row(const foveate_pick& call, ChooseRow row) {
    struct Shared {
        const foveate_pick& call;
        ChooseRow row;
        std::atomic<int64_t> next{0};
        std::atomic<int> failed{0};
    } shared{call, row};
    auto body = [](void* data) {
        Shared& shared = *static_cast<Shared*>(data);
        const foveate_pick& call = shared.call;
        try {
            Memory memory;
            for (int64_t i; (i = shared.next.fetch_add(1)) < call.rows * call.kinds;) {
                int32_t* indices = call.indices + i * call.width;
                const int64_t count = shared.row(call, i / call.kinds, call.scores + i * call.units, indices, memory);
                call.counts[i] = int32_t(count);
                std::fill(indices + count, indices + call.width, -1);
            }
        } catch (const std::bad_alloc&) {
            shared.failed = 1;
        }
    };
    constexpr int64_t kScores = 16384;  // about as much work as it costs to wake a thread
    const int64_t rows = call.rows * call.kinds, useful = rows * call.units / kScores + 1;
    const int64_t most = useful < rows ? useful : rows;
    foveate_on_threads(body, &shared, call.num_threads < most ? call.num_threads : most);
    return shared.failed;
}

// The best units of a row, at most ``limit`` of them.
int64_t choose_units(const foveate_pick& call, int64_t r, const float* scores, int32_t* indices, Memory& memory) {
    const int64_t first = std::max<int64_t>(call.first[r], 0), end = std::min<int64_t>(call.end[r], call.units);
    const int64_t count = std::min({std::max<int64_t>(end - first, 0), call.limit[r], call.width});
    if (count <= 0) return 0;
    memory.ranks.resize(size_t(end - first));
    for (int64_t u = first; u < end; ++u) memory.ranks[size_t(u - first)] = rank(scores[u], u, call.higher_ties);
    memory.ordered = memory.ranks;
    const auto last = memory.ordered.begin() + (count - 1);
    std::nth_element(memory.ordered.begin(), last, memory.ordered.end(), std::greater<uint64_t>());
    int64_t n = 0;
    for (int64_t u = first; u < end; ++u)
        if (memory.ranks[size_t(u - first)] >= *last) indices[n++] = int32_t(u);
    return n;
}

// Tokens of the best chunks of a row, the last of them in part, until ``limit`` are taken.
int64_t walk_chunks(const foveate_pick& call, int64_t r, const float* scores, int32_t* indices, Memory& memory) {
    const int64_t* start = call.start + r * call.units;
    const int64_t* length = call.length + r * call.units;
    std::vector<uint64_t>& heap = memory.ranks;
    heap.clear();
    memory.taken.assign(size_t(call.units), 0);
    for (int64_t c = 0; c < call.units; ++c)
        if (length[c] > 0) heap.push_back(rank(scores[c], c, false));
    std::make_heap(heap.begin(), heap.end());
    int64_t room = std::min(call.limit[r], call.width);
    while (room > 0 && !heap.empty()) {
        std::pop_heap(heap.begin(), heap.end());
        const int64_t chunk = int64_t(~uint32_t(heap.back()));
        heap.pop_back();
        memory.taken[size_t(chunk)] = std::min(room, length[chunk]);
        room -= memory.taken[size_t(chunk)];
    }
    int64_t n = 0;
    for (int64_t c = 0; c < call.units; ++c)
        for (int64_t i = 0; i < memory.taken[size_t(c)]; ++i) indices[n++] = int32_t(start[c] + i);
    return n;
}

}  // namespace

extern "C" {

int32_t foveate_pick_size(void) { return int32_t(sizeof(foveate_pick)); }

int32_t foveate_pick_units(const foveate_pick* call) { return each_row(*call, choose_units); }

int32_t foveate_pick_walk(const foveate_pick* call) { return each_row(*call, walk_chunks); }
}
