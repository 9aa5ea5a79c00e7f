// Products with weights in bfloat16: cuts a call into blocks of rows and panels, and runs them on threads.
#include "narrow.h"

#include <algorithm>

#include "items.h"

namespace {

constexpr int64_t kPanels = 4;  // of a block, at most: what several rows read lies in L2
constexpr int64_t kRows = 192;  // likewise, a multiple of what the kernels take at once
constexpr int64_t kBlocksPerThread = 8;
constexpr int64_t kPiecesPerThread = 4;

NarrowBlock block_of(const foveate_narrow& call) {
#if defined(FOVEATE_BUILT_NARROW_AVX512)
    if (call.isa >= FOVEATE_AVX512) return kNarrowAvx512;
#endif
#if defined(FOVEATE_BUILT_NARROW_AVX2)
    return kNarrowAvx2;
#endif
    return nullptr;
}

}  // namespace

extern "C" {

int32_t foveate_narrow_size(void) { return int32_t(sizeof(foveate_narrow)); }

int32_t foveate_narrow_run(const foveate_narrow* call_pointer) {
    const foveate_narrow& call = *call_pointer;
    const NarrowBlock block = block_of(call);
    const int64_t panels = ceil_div(call.out_channels, kNarrowPanel), row_blocks = ceil_div(call.rows, kRows);
    // Narrow enough that the threads end together; one row reads long ways in one piece.
    const int64_t wanted = (call.rows == 1 ? kPiecesPerThread : kBlocksPerThread) * call.num_threads;
    const int64_t width = std::clamp<int64_t>(panels * std::max<int64_t>(row_blocks, 1) / wanted, 1,
                                              call.rows == 1 ? std::max<int64_t>(panels, 1) : kPanels);
    run_items(ceil_div(panels, width) * row_blocks, call.num_threads, [&](int64_t i) {
        const int64_t row = i % row_blocks * kRows, panel = i / row_blocks * width;
        block(call, row, std::min(row + kRows, call.rows), panel, std::min(panel + width, panels));
    });
    return 0;
}
}
