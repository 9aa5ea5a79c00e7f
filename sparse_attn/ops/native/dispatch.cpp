// The C interface: chooses the instruction set, cuts a call into work items, and runs them on torch's threads.
//
// Items are taken from an atomic counter, the costly ones first, so that causal tiles of unequal length end together.
#include "kernels.h"

#include <atomic>
#include <cstdlib>
#include <new>
#include <vector>

#include "runtime.h"
#include "work.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

foveate_parallel g_parallel = nullptr;

// A thread's scratch memory, kept between calls.
class Scratch {
public:
    ~Scratch() { std::free(memory_); }
    void* reserve(int64_t bytes) {
        if (bytes > size_) {
            std::free(memory_);
            size_ = (bytes + 4095) / 4096 * 4096;
            memory_ = std::aligned_alloc(4096, size_t(size_));
            if (!memory_) size_ = 0;
        }
        return memory_;
    }

private:
    void* memory_ = nullptr;
    int64_t size_ = 0;
};

#if defined(__x86_64__)

struct CpuId {
    unsigned eax, ebx, ecx, edx;
    CpuId(unsigned leaf, unsigned subleaf) { __cpuid_count(leaf, subleaf, eax, ebx, ecx, edx); }
};

// State components that the operating system saves: AVX is 0x6, AVX-512 0xe6, AMX 0x60000.
bool saves(uint64_t components) {
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (((uint64_t(high) << 32) | low) & components) == components;
}

bool may_use_tiles() {
#if defined(__linux__)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

bool cpu_has(int isa) {
    if (__get_cpuid_max(0, nullptr) < 7) return false;
    const CpuId one(1, 0), seven(7, 0);
    const bool osxsave = one.ecx >> 27 & 1, fma = one.ecx >> 12 & 1;
    if (!osxsave || !fma || !(seven.ebx >> 5 & 1) || !saves(0x6)) return false;
    if (isa == FOVEATE_AVX2) return true;
    const unsigned avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
    if ((seven.ebx & avx512) != avx512 || !saves(0xe6)) return false;
    if (isa == FOVEATE_AVX512) return true;
    if (seven.eax < 1 || !(CpuId(7, 1).eax >> 5 & 1)) return false;  // AVX512-BF16
    if (isa == FOVEATE_AVX512BF16) return true;
    const bool tiles = seven.edx >> 24 & 1, tile_bf16 = seven.edx >> 22 & 1;
    return tiles && tile_bf16 && saves(0x60000) && may_use_tiles();
}

#endif

bool has_isa(int isa) {
#if defined(__x86_64__)
    switch (isa) {
#if defined(FOVEATE_BUILT_AVX2)
        case FOVEATE_AVX2: return cpu_has(isa);
#endif
#if defined(FOVEATE_BUILT_AVX512)
        case FOVEATE_AVX512: return cpu_has(isa);
#endif
#if defined(FOVEATE_BUILT_AVX512BF16)
        case FOVEATE_AVX512BF16: return cpu_has(isa);
#endif
#if defined(FOVEATE_BUILT_AMX)
        case FOVEATE_AMX: return cpu_has(isa);
#endif
        default: return false;
    }
#else
    (void)isa;
    return false;
#endif
}

// The kernels of a call: what its instruction set lacks for its element type comes from the one below.
const IsaKernels* kernels_for(const foveate_attention& call) {
    const int isa = call.dtype == FOVEATE_FLOAT32 && call.isa > FOVEATE_AVX512 ? FOVEATE_AVX512 : call.isa;
    switch (isa) {
#if defined(FOVEATE_BUILT_AVX2)
        case FOVEATE_AVX2: return &kAvx2Kernels[call.dtype];
#endif
#if defined(FOVEATE_BUILT_AVX512)
        case FOVEATE_AVX512: return &kAvx512Kernels[call.dtype];
#endif
#if defined(FOVEATE_BUILT_AVX512BF16)
        case FOVEATE_AVX512BF16: return kAvx512Bf16Kernels;
#endif
#if defined(FOVEATE_BUILT_AMX)
        case FOVEATE_AMX: return kAmxKernels;
#endif
        default: return nullptr;
    }
}

// Runs ``work(scratch)`` on the threads of a call, each with ``bytes`` of scratch memory.
template <class Work>
int run_threads(const foveate_attention& call, const IsaKernels& kernels, int64_t bytes, int64_t items, Work work) {
    struct Shared {
        Work& work;
        const IsaKernels& kernels;
        int64_t bytes;
        std::atomic<int> failed{0};
    } shared{work, kernels, bytes};
    auto body = [](void* data) {
        Shared& shared = *static_cast<Shared*>(data);
        void* scratch = foveate_scratch(shared.bytes, 0);
        if (!scratch) {
            shared.failed = 1;
            return;
        }
        shared.kernels.begin();
        shared.work(scratch);
        shared.kernels.end();
    };
    foveate_on_threads(body, &shared, call.num_threads < items ? call.num_threads : items);
    return shared.failed;
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

// Longest run of queries for an item: what fits in L2, or less where there would be too few items for the threads.
int longest_run(const foveate_attention& call, const IsaKernels& kernels, int64_t queries, int kinds) {
    const int group = heads_per_kind(call);
    const int64_t fits = kernels.prefill_rows(call) / group;
    const int64_t even = queries * kinds / (4 * int64_t(call.num_threads)) + 1;
    const int64_t least = 128 / group;  // below this, packing K and V costs more than idle threads
    const int64_t longest = even < least ? least : even;
    return int(longest < fits ? (longest > 0 ? longest : 1) : (fits > 0 ? fits : 1));
}

}  // namespace

bool foveate_cpu_has(int isa) {
#if defined(__x86_64__)
    return cpu_has(isa);
#else
    (void)isa;
    return false;
#endif
}

void foveate_on_threads(void (*body)(void*), void* data, int64_t threads) {
    if (threads > 1 && g_parallel) g_parallel(body, data, unsigned(threads), 0);
    else body(data);
}

void* foveate_scratch(int64_t bytes, int number) {
    thread_local Scratch scratch[2];
    return scratch[number].reserve(bytes);
}

extern "C" {

void foveate_set_parallel(foveate_parallel parallel) { g_parallel = parallel; }

int32_t foveate_has_isa(int32_t isa) { return has_isa(isa); }

int32_t foveate_attention_size(void) { return int32_t(sizeof(foveate_attention)); }

int32_t foveate_prefill(const foveate_attention* call_pointer) try {
    const foveate_attention& call = *call_pointer;
    const IsaKernels& kernels = *kernels_for(call);
    const int kinds = call.indices ? call.selected_heads : call.num_kv_heads;
    const int64_t queries = call.query_offsets[call.num_sequences];
    const int longest = longest_run(call, kernels, queries, kinds);
    std::vector<PrefillItem> items;
    if (call.indices) {
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
    const int64_t bytes = kernels.prefill_scratch(call, longest * heads_per_kind(call));
    std::atomic<int64_t> next{count};  // from the back: the last tiles of a prompt read most keys
    return run_threads(call, kernels, bytes, count, [&](void* scratch) {
        for (int64_t i; (i = next.fetch_sub(1) - 1) >= 0;) kernels.prefill(call, items[size_t(i)], scratch);
    });
} catch (const std::bad_alloc&) {
    return 1;
}

int32_t foveate_decode(const foveate_attention* call_pointer) try {
    const foveate_attention& call = *call_pointer;
    const IsaKernels& kernels = *kernels_for(call);
    const int group = heads_per_kind(call), kinds = call.num_heads / group;
    const int64_t rows = int64_t(call.num_sequences) * kinds;
    // Parts of at least this many keys: a shorter one does not pay for its share of the merge.
    constexpr int64_t kLeastKeys = 256;
    const int64_t wanted = (4 * int64_t(call.num_threads) + rows - 1) / (rows > 0 ? rows : 1);
    std::vector<DecodeItem> items;
    std::vector<int64_t> first_item(size_t(rows) + 1);
    items.reserve(size_t(rows * wanted));
    for (int64_t row = 0; row < rows; ++row) {
        const int s = int(row / kinds), kind = int(row % kinds);
        int64_t first, last, unit = 1;
        if (call.indices) {
            first = 0;
            last = call.counts[row];
            unit = call.granularity;
        } else {
            const int64_t position = int64_t(call.context_lens[s]) - 1;
            first = position - call.farthest + 1 > 0 ? position - call.farthest + 1 : 0;
            last = position - call.nearest + 1 > first ? position - call.nearest + 1 : first;
        }
        int64_t parts = (last - first) * unit / kLeastKeys;
        if (parts > wanted) parts = wanted;
        if (parts < 1) parts = 1;
        first_item[size_t(row)] = int64_t(items.size());
        for (int64_t p = 0; p < parts; ++p)
            items.push_back({s, kind, first + (last - first) * p / parts, first + (last - first) * (p + 1) / parts});
    }
    first_item[size_t(rows)] = int64_t(items.size());
    const int64_t count = int64_t(items.size()), size = int64_t(group) * (call.head_dim + 2);
    std::vector<float> partials(size_t(count * size));
    std::vector<std::atomic<int32_t>> done(static_cast<size_t>(rows));
    std::atomic<int64_t> next{0};
    return run_threads(call, kernels, kernels.decode_scratch(call), count, [&](void* scratch) {
        for (int64_t i; (i = next.fetch_add(1)) < count;) {
            const DecodeItem& item = items[size_t(i)];
            kernels.decode(call, item, partials.data() + i * size, scratch);
            const size_t row = size_t(int64_t(item.sequence) * kinds + item.kind);
            const int parts = int(first_item[row + 1] - first_item[row]);
            if (done[row].fetch_add(1) + 1 == parts)  // whoever ends last merges
                kernels.decode_merge(call, item.sequence, item.kind, partials.data() + first_item[row] * size, parts);
        }
    });
} catch (const std::bad_alloc&) {
    return 1;
}
}
