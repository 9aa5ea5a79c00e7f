// The C interface of anchor scores: cuts a call into tiles and heads, and runs them on threads.
#include "anchor_call.h"

#include <cstring>

#include "anchor_kernels.h"
#include "items.h"
#include "work.h"

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

constexpr int64_t kPartKeys = 1024;         // of a thread's part of a row: 256 KiB of float32 keys at 64 channels
static_assert(kPartKeys % kDecodeBlock == 0 && 512 % kDecodeBlock == 0);
constexpr int64_t kWeightBytes = 32 << 20;  // of decode rows at once

// Where none is left out, they are chosen whatever their scores.
bool needs_scores(const foveate_anchor& call, int tile) {
    if (call.scores) return true;
    const int64_t end = end_of(call, tile), last = call.end[tile] < end ? call.end[tile] : end;
    return last - call.first[tile] > call.budgets[tile];
}

// One tile for one row of the result: pools the heads' scores by ``pool(head)``, then hands them out or chooses.
template <class Pool>
void run_item(const foveate_anchor& call, const AnchorKernels& kernels, int tile, int row, float* scores, Pool pool) {
    const foveate_attention& attention = call.attention;
    const int kinds = call.pool_all ? 1 : attention.num_kv_heads;
    const int64_t at = int64_t(tile) * kinds + row, end = end_of(call, tile);
    const int64_t last = call.indices && call.end[tile] < end ? call.end[tile] : end;
    std::memset(scores, 0, size_t((end + 511) / 512 * 512) * 4);
    const int first_head = call.pool_all ? 0 : row, last_head = call.pool_all ? attention.num_kv_heads : row + 1;
    if (needs_scores(call, tile))
        for (int head = first_head; head < last_head; ++head) pool(head);
    if (call.scores) std::memcpy(call.scores + at * call.score_width, scores, size_t(end) * 4);
    if (!call.indices) return;
    int32_t* indices = call.indices + at * call.index_width;
    const int64_t budget = call.budgets[tile] < call.index_width ? call.budgets[tile] : call.index_width;
    const int count = kernels.choose(scores, call.first[tile], last, budget, indices);
    for (int64_t i = count; i < call.index_width; ++i) indices[i] = -1;
    call.counts[at] = count;
}

// Runs ``work(item, scratch)``, the last item first: the last tiles of a prompt have the most keys.
template <class Work>
int32_t for_items(const foveate_anchor& call, const AnchorKernels& kernels, int64_t items, int64_t bytes, Work work) {
    return run_items(kernels, items, call.attention.num_threads, bytes, [&](int64_t i, void* scratch) {
        work(items - 1 - i, static_cast<char*>(scratch));
    });
}

// Tiles of one query each: the weights of some tiles by parts of the keys, then their rows.
int32_t run_decode(const foveate_anchor& call, const AnchorKernels& kernels, int64_t longest) {
    const foveate_attention& attention = call.attention;
    const int kv_heads = attention.num_kv_heads, kinds = call.pool_all ? 1 : kv_heads;
    const int group = heads_per_kind(attention);
    const int64_t width = (longest + 511) / 512 * 512, parts = (longest + kPartKeys - 1) / kPartKeys;
    const int64_t of_head = group * width, of_tile = kv_heads * of_head;
    const int64_t fitting = kWeightBytes / (of_tile * 4), step = fitting < 1 ? 1 : fitting;
    for (int64_t begin = 0; begin < attention.num_tiles; begin += step) {
        const int64_t tiles = step < attention.num_tiles - begin ? step : attention.num_tiles - begin;
        char* memory = static_cast<char*>(
            foveate_scratch(tiles * of_tile * 4 + tiles * of_tile / kDecodeBlock * int64_t(sizeof(AnchorBlock)), 1));
        if (!memory) return 1;
        float* weights = reinterpret_cast<float*>(memory);
        AnchorBlock* blocks = reinterpret_cast<AnchorBlock*>(memory + tiles * of_tile * 4);
        const auto weight_part = [&](int64_t i, char* scratch) {
            const int head = int(i % kv_heads), tile = int(begin + i / kv_heads % tiles);
            const int64_t first = i / (kv_heads * tiles) * kPartKeys, end = end_of(call, tile);
            const int64_t last = first + kPartKeys < end ? first + kPartKeys : end;
            const int64_t at = (tile - begin) * of_tile + head * of_head;
            if (first < last && needs_scores(call, tile))
                kernels.weights(call, tile, head, first, last, weights + at, blocks + at / kDecodeBlock, width, scratch);
        };
        if (for_items(call, kernels, parts * tiles * kv_heads, kernels.weights_scratch(call), weight_part)) return 1;
        const auto row = [&](int64_t i, char* scratch) {
            const int tile = int(begin + i / kinds);
            float* scores = reinterpret_cast<float*>(scratch);
            run_item(call, kernels, tile, int(i % kinds), scores, [&](int head) {
                const int64_t at = (tile - begin) * of_tile + head * of_head;
                kernels.add(call, head, end_of(call, tile), weights + at, blocks + at / kDecodeBlock, width, scores);
            });
        };
        if (for_items(call, kernels, tiles * kinds, width * 4, row)) return 1;
    }
    return 0;
}

// Tiles of a prompt: each is an item by itself.
int32_t run_prefill(const foveate_anchor& call, const AnchorKernels& kernels, int64_t longest) {
    const int kinds = call.pool_all ? 1 : call.attention.num_kv_heads;
    int64_t inner = 0;
    for (int tile = 0; tile < call.attention.num_tiles; ++tile) {
        const int64_t bytes = kernels.scratch(call, tile);
        if (bytes > inner) inner = bytes;
    }
    const int64_t room = (longest + 511) / 512 * 512 * 4, items = int64_t(call.attention.num_tiles) * kinds;
    return for_items(call, kernels, items, room + inner, [&](int64_t i, char* scratch) {
        const int tile = int(i / kinds);
        float* scores = reinterpret_cast<float*>(scratch);
        run_item(call, kernels, tile, int(i % kinds), scores,
                 [&](int head) { kernels.pool(call, tile, head, scores, scratch + room); });
    });
}

}  // namespace

extern "C" {

int32_t foveate_anchor_size(void) { return int32_t(sizeof(foveate_anchor)); }

int32_t foveate_anchor_run(const foveate_anchor* call_pointer) {
    const foveate_anchor& call = *call_pointer;
    const AnchorKernels& kernels = *kernels_for(call.attention);
    int64_t longest = 0;
    bool single = true;
    for (int tile = 0; tile < call.attention.num_tiles; ++tile) {
        const int64_t end = end_of(call, tile);
        if (end > longest) longest = end;
        single = single && call.attention.tile_count[tile] == 1;
    }
    return single ? run_decode(call, kernels, longest) : run_prefill(call, kernels, longest);
}
}
