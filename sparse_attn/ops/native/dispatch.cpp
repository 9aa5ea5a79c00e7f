// The C interface: chooses the instruction set, cuts a call into work items, and runs them on threads.
//
// Items are taken from an atomic counter, the costly ones first, so that causal tiles of unequal length end together.
#include "kernels.h"

#include <atomic>
#include <cstdlib>
#include <new>
#include <vector>

#include "items.h"
#include "pool.h"
#include "work.h"

namespace {

foveate_parallel g_parallel = nullptr;
std::atomic<bool> g_keeps_threads{false};

// A thread's scratch memory, kept between calls.
class Scratch {
public:
    ~Scratch() { std::free(memory_); }
    void* reserve(int64_t bytes) {
        // What one very long prompt took is not kept for ever.
        if (bytes > size_ || (size_ > kLarge && bytes < size_ / 8)) {
            std::free(memory_);
            size_ = (bytes + 4095) / 4096 * 4096;
            memory_ = std::aligned_alloc(4096, size_t(size_));
            if (!memory_) size_ = 0;
        }
        return memory_;
    }

private:
    static constexpr int64_t kLarge = 16 << 20;
    void* memory_ = nullptr;
    int64_t size_ = 0;
};

bool has_isa(int isa) {
    switch (isa) {
#if defined(FOVEATE_BUILT_AVX2)
        case FOVEATE_AVX2: return foveate_cpu_has(isa);
#endif
#if defined(FOVEATE_BUILT_AVX512)
        case FOVEATE_AVX512: return foveate_cpu_has(isa);
#endif
#if defined(FOVEATE_BUILT_AVX512BF16) && defined(FOVEATE_BUILT_ANCHOR_AVX512BF16)
        case FOVEATE_AVX512BF16: return foveate_cpu_has(isa);
#endif
#if defined(FOVEATE_BUILT_AMX)
        case FOVEATE_AMX: return foveate_cpu_has(isa);
#endif
        default: return false;
    }
}

// The kernels of a call: what its instruction set lacks for its element type comes from the one below.
const IsaKernels* kernels_for(const foveate_attention& call) {
    const int isa = call.dtype == FOVEATE_FLOAT32 && call.isa > FOVEATE_AVX512 ? FOVEATE_AVX512 : call.isa;
    const int pages = call.key_scales ? 1 : 0;  // int8, or the call's own type
    switch (isa) {
#if defined(FOVEATE_BUILT_AVX2)
        case FOVEATE_AVX2: return &kAvx2Kernels[call.dtype + 2 * pages];
#endif
#if defined(FOVEATE_BUILT_AVX512)
        case FOVEATE_AVX512: return &kAvx512Kernels[call.dtype + 2 * pages];
#endif
#if defined(FOVEATE_BUILT_AVX512BF16)
        case FOVEATE_AVX512BF16: return &kAvx512Bf16Kernels[pages];
#endif
#if defined(FOVEATE_BUILT_AMX)
        case FOVEATE_AMX: return &kAmxKernels[pages];
#endif
        default: return nullptr;
    }
}

void split(std::vector<PrefillItem>& items, int row, int sequence, int start, int count, int position, int longest,
           int kinds) {
    const int pieces = (count + longest - 1) / longest;
    for (int i = 0; i < pieces; ++i) {
        const int from = int(int64_t(count) * i / pieces), to = int(int64_t(count) * (i + 1) / pieces);
        for (int kind = 0; kind < kinds; ++kind)
            items.push_back({row, sequence, start + from, to - from, position + from, kind});
    }
}

// Do so few query rows share their keys that packing these would cost more than reading them once per query?
bool alone(const foveate_attention& call) {
    constexpr int64_t kLeastRows = 8;
    int64_t queries = 0;
    for (int row = 0; row < call.num_tiles; ++row) queries += call.tile_count[row];
    return queries * heads_per_kind(call) < kLeastRows * call.num_tiles;
}

// Has each query units of its own, and do enough queries share each unit that gathering them fills vectors?
bool gathers(const foveate_attention& call, const IsaKernels& kernels) {
    constexpr int64_t kLeastUnit = 16, kLeastColumns = 8;
    if (!call.indices || call.granularity < kLeastUnit || call.num_tiles != call.query_offsets[call.num_sequences] ||
        call.num_tiles == call.num_sequences)
        return false;
    int64_t queries = 0, context = 0;
    for (int s = 0; s < call.num_sequences; ++s) {
        const int64_t count = call.query_offsets[s + 1] - call.query_offsets[s];
        if (count > queries) queries = count;
        if (call.context_lens[s] > context) context = call.context_lens[s];
    }
    const int64_t rows = queries * (call.num_heads / call.num_kv_heads), fits = kernels.gathered_rows(call);
    return (rows < fits ? rows : fits) * call.selected_width >= kLeastColumns * units_of(call, context);
}

// Longest run of queries for an item with ``group`` rows for each: what fits in L2, or less where there would be too
// few items for the threads.
int longest_run(const foveate_attention& call, int rows, int group, int64_t queries, int kinds) {
    const int64_t fits = rows / group;
    const int64_t even = queries * kinds / (4 * int64_t(call.num_threads)) + 1;
    const int64_t least = 128 / group;  // below this, packing K and V costs more than idle threads
    const int64_t longest = even < least ? least : even;
    return int(longest < fits ? (longest > 0 ? longest : 1) : (fits > 0 ? fits : 1));
}

// A query that is computed on its own: its selection row, sequence, place in the packed row, and position.
struct OneQuery {
    int32_t row, sequence, query, position;
};

// The decode kernel over some queries. The keys of a query are split where there are too few queries for the threads.
int run_queries(const foveate_attention& call, const IsaKernels& kernels, const std::vector<OneQuery>& queries) {
    const int group = heads_per_kind(call), kinds = call.num_heads / group;
    const int64_t rows = int64_t(queries.size()) * kinds;
    if (rows == 0) return 0;
    // Parts of at least this many keys: a shorter one does not pay for its share of the merge.
    constexpr int64_t kLeastKeys = 256;
    const int64_t wanted = (4 * int64_t(call.num_threads) + rows - 1) / rows;
    struct Row {
        int64_t partial;  // place of its first part among the partial results
        int32_t parts;
    };
    std::vector<DecodeItem> items;
    std::vector<Row> split(static_cast<size_t>(rows));
    items.reserve(size_t(rows * wanted));
    int64_t partial_count = 0, keys = 0;
    for (int64_t row = 0; row < rows; ++row) {
        const OneQuery& one = queries[size_t(row / kinds)];
        const int kind = int(row % kinds);
        int64_t first = 0, last, unit = 1;
        if (call.indices) {
            last = call.counts[int64_t(one.row) * call.selected_heads + kind];
            unit = call.granularity;
        } else {
            const int64_t begin = int64_t(one.position) - call.farthest + 1, end = int64_t(one.position) - call.nearest + 1;
            first = begin > 0 ? begin : 0;
            last = end > first ? end : first;
        }
        keys += (last - first) * unit;
        int64_t parts = (last - first) * unit / kLeastKeys;
        parts = parts > wanted ? wanted : parts < 1 ? 1 : parts;
        split[size_t(row)] = {partial_count, int32_t(parts)};
        if (parts > 1) partial_count += parts;
        // Cut where pages begin: then keys lie side by side in memory as they do in a block.
        const int64_t grain = call.indices ? 1 : 64;
        int64_t from = first;
        for (int64_t p = 0; p < parts; ++p) {
            const int64_t cut = (first + (last - first) * (p + 1) / parts) / grain * grain;
            const int64_t to = p + 1 == parts ? last : cut;
            items.push_back({row, p, one.row, one.sequence, one.query, kind, one.position, from, to});
            from = to;
        }
    }
    const bool by_score = call.threshold != nullptr;
    const auto decode = by_score ? kernels.threshold : kernels.decode;
    const auto merge = by_score ? kernels.threshold_merge : kernels.decode_merge;
    const int64_t count = int64_t(items.size());
    const int64_t size = by_score ? kernels.threshold_partial(call) : int64_t(group) * (call.head_dim + 2);
    std::vector<float> partials(size_t(partial_count * size));
    std::vector<std::atomic<int32_t>> done(static_cast<size_t>(rows));
    const int64_t bytes = by_score ? kernels.threshold_scratch(call) : kernels.decode_scratch(call);
    const int64_t element = call.key_scales ? 1 : call.dtype == FOVEATE_FLOAT32 ? 4 : 2;
    const int64_t threads = threads_for(call.num_threads, keys * 2 * call.head_dim * element);
    return run_items(kernels, count, threads, bytes + size * 4, [&](int64_t i, void* scratch) {
        const DecodeItem& item = items[size_t(i)];
        const Row& row = split[size_t(item.whole)];
        // A query in one part needs no partial result that outlives its item.
        float* first = row.parts == 1 ? reinterpret_cast<float*>(static_cast<char*>(scratch) + bytes)
                                      : partials.data() + row.partial * size;
        decode(call, item, first + item.part * size, scratch);
        if (done[size_t(item.whole)].fetch_add(1) + 1 == row.parts)  // whoever ends last merges
            merge(call, item.query, item.kind, first, row.parts);
    });
}

}  // namespace

void foveate_on_threads(void (*body)(void*), void* data, int64_t threads) {
    if (threads <= 1) body(data);
    else if (g_keeps_threads) foveate_pool_run(body, data, unsigned(threads), g_parallel);
    else if (g_parallel) g_parallel(body, data, unsigned(threads), 0);
    else body(data);
}

void* foveate_scratch(int64_t bytes, int number) {
    thread_local Scratch scratch[4];
    return scratch[number].reserve(bytes);
}

extern "C" {

void foveate_set_parallel(foveate_parallel parallel) { g_parallel = parallel; }

void foveate_keep_threads(int32_t keep) { g_keeps_threads = keep != 0; }

int32_t foveate_has_isa(int32_t isa) { return has_isa(isa); }

int32_t foveate_attention_size(void) { return int32_t(sizeof(foveate_attention)); }

int32_t foveate_threshold_size(void) { return int32_t(sizeof(foveate_threshold)); }

int32_t foveate_prefill(const foveate_attention* call_pointer) try {
    const foveate_attention& call = *call_pointer;
    const IsaKernels& kernels = *kernels_for(call);
    const bool gathered = gathers(call, kernels);
    const int kinds = call.indices && !gathered ? call.selected_heads : call.num_kv_heads;
    const int group = call.num_heads / kinds;
    const int64_t queries = call.query_offsets[call.num_sequences];
    const int fits = gathered ? kernels.gathered_rows(call) : kernels.prefill_rows(call);
    const int longest = longest_run(call, fits, group, queries, kinds);
    if (call.indices && !gathered && alone(call)) {
        std::vector<OneQuery> ones;
        ones.reserve(size_t(queries));
        for (int row = 0; row < call.num_tiles; ++row)
            for (int i = 0; i < call.tile_count[row]; ++i)
                ones.push_back({row, call.tile_sequence[row], call.tile_start[row] + i, call.tile_position[row] + i});
        return run_queries(call, kernels, ones);
    }
    std::vector<PrefillItem> items;
    if (call.indices && !gathered) {
        for (int row = 0; row < call.num_tiles; ++row)
            split(items, row, call.tile_sequence[row], call.tile_start[row], call.tile_count[row],
                  call.tile_position[row], longest, kinds);
    } else {
        for (int s = 0; s < call.num_sequences; ++s) {
            const int start = call.query_offsets[s], count = call.query_offsets[s + 1] - start;
            split(items, -1, s, start, count, call.context_lens[s] - count, longest, kinds);
        }
    }
    const int64_t count = int64_t(items.size());
    int64_t context = 0;
    for (int s = 0; s < call.num_sequences; ++s) context = context < call.context_lens[s] ? call.context_lens[s] : context;
    const int64_t bytes = gathered ? kernels.gathered_scratch(call, longest, units_of(call, context))
                                   : kernels.prefill_scratch(call, longest * group);
    const auto compute = gathered ? kernels.gathered : kernels.prefill;
    // From the back: the last tiles of a prompt read most keys.
    return run_items(kernels, count, call.num_threads, bytes,
                     [&](int64_t i, void* scratch) { compute(call, items[size_t(count - 1 - i)], scratch); });
} catch (const std::bad_alloc&) {
    return 1;
}

int32_t foveate_decode(const foveate_attention* call_pointer) try {
    const foveate_attention& call = *call_pointer;
    std::vector<OneQuery> queries;
    queries.reserve(size_t(call.num_sequences));
    for (int s = 0; s < call.num_sequences; ++s) queries.push_back({s, s, s, call.context_lens[s] - 1});
    return run_queries(call, *kernels_for(call), queries);
} catch (const std::bad_alloc&) {
    return 1;
}
}
