// Sums of runs and bounds of pages: cuts a call into items, and runs them on threads.
#include "scan.h"

#include "items.h"

namespace {

constexpr int64_t kPages = 64;  // of an item of bounds

const ScanKernels& kernels_of(const foveate_scan& call) {
#if defined(FOVEATE_BUILT_SCAN_AVX512)
    if (call.isa >= FOVEATE_AVX512) return kScanAvx512[call.dtype];
#endif
    return kScanAvx2[call.dtype];
}

}  // namespace

extern "C" {

int32_t foveate_scan_size(void) { return int32_t(sizeof(foveate_scan)); }

int32_t foveate_scan_sums(const foveate_scan* call_pointer) {
    const foveate_scan& call = *call_pointer;
    const ScanKernels& kernels = kernels_of(call);
    const int64_t items = call.num_sequences * call.runs;
    int64_t keys = 0;
    for (int64_t i = 0; i < items; ++i) keys += call.length[i];
    const int64_t rows = call.sums ? keys / 8 : keys;  // that are read, where most runs are summed up already
    run_items(items, threads_for(call.num_threads, rows * call.num_kv_heads * call.head_dim * 2), [&](int64_t i) {
        kernels.sums(call, int(i / call.runs), i % call.runs);
    });
    return 0;
}

int32_t foveate_scan_bounds(const foveate_scan* call_pointer) {
    const foveate_scan& call = *call_pointer;
    const ScanKernels& kernels = kernels_of(call);
    const int64_t parts = (call.pages + kPages - 1) / kPages, each = parts * call.num_kv_heads;
    const int64_t rows = int64_t(call.num_sequences) * call.num_kv_heads * call.pages;
    run_items(call.num_sequences * each, threads_for(call.num_threads, rows * call.head_dim * 8), [&](int64_t i) {
        const int64_t head = i % each / parts, first = i % parts * kPages, last = first + kPages;
        kernels.bounds(call, int(i / each), int(head), first, last < call.pages ? last : call.pages);
    });
    return 0;
}
}
