// The C interface of anchor scores: cuts a call into tiles and heads, and runs them on torch's threads.
#include "anchor_call.h"

#include <atomic>
#include <cstring>

#include "anchor_kernels.h"
#include "runtime.h"

namespace {

// The kernels of a call: what its instruction set lacks for its element type comes from the one below.
const AnchorKernels* kernels_for(const foveate_attention& call) {
    const int isa = call.dtype == FOVEATE_FLOAT32 && call.isa > FOVEATE_AVX512 ? FOVEATE_AVX512 : call.isa;
    const int pages = call.key_scales ? 1 : 0;  // int8, or the call's own type
    switch (isa) {
#if defined(FOVEATE_BUILT_ANCHOR_AVX2)
        case FOVEATE_AVX2: return &kAnchorAvx2[call.dtype + 2 * pages];
#endif
#if defined(FOVEATE_BUILT_ANCHOR_AVX512)
        case FOVEATE_AVX512: return &kAnchorAvx512[call.dtype + 2 * pages];
#endif
#if defined(FOVEATE_BUILT_ANCHOR_AVX512BF16)
        case FOVEATE_AVX512BF16: return &kAnchorAvx512Bf16[pages];
#endif
#if defined(FOVEATE_BUILT_ANCHOR_AMX)
        case FOVEATE_AMX: return &kAnchorAmx[pages];
#endif
        default: return nullptr;
    }
}

int64_t last_position(const foveate_attention& call, int tile) {
    return int64_t(call.tile_position[tile]) + call.tile_count[tile];
}

// One tile for one row of the result: pools, then hands out the scores or chooses.
void run_item(const foveate_anchor& call, const AnchorKernels& kernels, int tile, int row, float* scores, void* scratch) {
    const foveate_attention& attention = call.attention;
    const int kinds = call.pool_all ? 1 : attention.num_kv_heads;
    const int64_t at = int64_t(tile) * kinds + row, end = last_position(attention, tile);
    const int64_t last = call.indices && call.end[tile] < end ? call.end[tile] : end;
    const bool leaves_out = call.indices && last - call.first[tile] > call.budgets[tile];
    std::memset(scores, 0, size_t((end + 511) / 512 * 512) * 4);
    // Where none is left out, they are chosen whatever their scores.
    const int first_head = call.pool_all ? 0 : row, last_head = call.pool_all ? attention.num_kv_heads : row + 1;
    if (call.scores || leaves_out)
        for (int head = first_head; head < last_head; ++head) kernels.pool(call, tile, head, scores, scratch);
    if (call.scores) std::memcpy(call.scores + at * call.score_width, scores, size_t(end) * 4);
    if (!call.indices) return;
    int32_t* indices = call.indices + at * call.index_width;
    const int64_t budget = call.budgets[tile] < call.index_width ? call.budgets[tile] : call.index_width;
    const int count = kernels.choose(scores, call.first[tile], last, budget, indices);
    for (int64_t i = count; i < call.index_width; ++i) indices[i] = -1;
    call.counts[at] = count;
}

}  // namespace

extern "C" {

int32_t foveate_anchor_size(void) { return int32_t(sizeof(foveate_anchor)); }

int32_t foveate_anchor_run(const foveate_anchor* call_pointer) {
    const foveate_anchor& call = *call_pointer;
    const foveate_attention& attention = call.attention;
    const AnchorKernels& kernels = *kernels_for(attention);
    int64_t inner = 0, longest = 0;
    for (int tile = 0; tile < attention.num_tiles; ++tile) {
        const int64_t bytes = kernels.scratch(call, tile), end = last_position(attention, tile);
        if (bytes > inner) inner = bytes;
        if (end > longest) longest = end;
    }
    const int64_t room = (longest + 511) / 512 * 512 * 4;
    const int kinds = call.pool_all ? 1 : attention.num_kv_heads;
    struct Shared {
        const foveate_anchor& call;
        const AnchorKernels& kernels;
        int64_t room, bytes;
        int kinds;
        std::atomic<int64_t> next;
        std::atomic<int> failed{0};
    } shared{call, kernels, room, room + inner, kinds, {int64_t(attention.num_tiles) * kinds}};
    auto body = [](void* data) {
        Shared& shared = *static_cast<Shared*>(data);
        char* scratch = static_cast<char*>(foveate_scratch(shared.bytes, 0));
        if (!scratch) {
            shared.failed = 1;
            return;
        }
        shared.kernels.begin();
        // From the back: the last tiles of a prompt have the most keys.
        for (int64_t i; (i = shared.next.fetch_sub(1) - 1) >= 0;)
            run_item(shared.call, shared.kernels, int(i / shared.kinds), int(i % shared.kinds),
                     reinterpret_cast<float*>(scratch), scratch + shared.room);
        shared.kernels.end();
    };
    const int64_t items = int64_t(attention.num_tiles) * kinds;
    foveate_on_threads(body, &shared, attention.num_threads < items ? attention.num_threads : items);
    return shared.failed;
}
}
