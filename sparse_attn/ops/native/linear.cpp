// The C interface of the linear layers: chooses the instruction set, and cuts a call into work items for threads.
#include "linear.h"

#include "items.h"

namespace {

const LinearKernels* compiled(int isa) {
    switch (isa) {
#if defined(FOVEATE_BUILT_LINEAR_AVX2)
        case FOVEATE_LINEAR_AVX2: return &kLinearAvx2;
#endif
#if defined(FOVEATE_BUILT_LINEAR_AVXVNNI)
        case FOVEATE_LINEAR_AVXVNNI: return &kLinearAvxVnni;
#endif
#if defined(FOVEATE_BUILT_LINEAR_AVX512VNNI)
        case FOVEATE_LINEAR_AVX512VNNI: return &kLinearAvx512Vnni;
#if defined(FOVEATE_BUILT_LINEAR_AMX)
        case FOVEATE_LINEAR_AMX: return &kLinearAmx;
#endif
#endif
        default: return nullptr;
    }
}

// Null where it was not compiled in, or the CPU lacks it.
const LinearKernels* kernels_for(int isa) {
    const LinearKernels* kernels = compiled(isa);
    return kernels && foveate_cpu_has_linear(isa) ? kernels : nullptr;
}

const LinearKernels* kernels_for(const foveate_linear& call, int64_t byte_rows) {
    const LinearKernels* kernels = kernels_for(call.isa);
    const bool few = kernels && (call.weight_bits == 4 || byte_rows < kernels->least_rows);
    return few && call.isa == FOVEATE_LINEAR_AMX ? kernels_for(FOVEATE_LINEAR_AVX512VNNI) : kernels;
}

constexpr int64_t kRowStep = 32;    // rows of a pair of tiles; an item has scratch for no fewer
constexpr int64_t kMostRows = 256;  // of an item, so that its input stays in L2
constexpr int64_t kQuantizeRows = 8;

}  // namespace

extern "C" {

int32_t foveate_linear_has_isa(int32_t isa) { return kernels_for(isa) != nullptr; }

int32_t foveate_linear_size(void) { return int32_t(sizeof(foveate_linear)); }

int32_t foveate_linear_run(const foveate_linear* call_pointer) {
    const foveate_linear& call = *call_pointer;
    const int planes = call.activation_bits / 8;
    const LinearKernels& kernels = *kernels_for(call, call.rows * planes);
    const int64_t panel = call.rows > 1 && call.weight_bits == 4 && planes == 1 ? kernels.panel : 1;
    const int64_t row_step = padded_to(kRowStep, panel);
    const int64_t stride = padded_to(call.in_channels, 64), room = padded_to(call.rows, row_step);
    const int64_t sums = call.weight_bits == 4 ? stride / 32 : 0, scales = sums && planes == 1 ? sums : 1;
    char* memory = static_cast<char*>(foveate_scratch(room * (planes * stride + (scales + sums) * 4), 1));
    if (!memory) return 1;
    Activations input;
    input.bytes = reinterpret_cast<uint8_t*>(memory);
    input.stride = stride;
    input.planes = planes;
    input.panel = panel;
    input.scales = reinterpret_cast<float*>(memory + room * planes * stride);
    input.group_sums = input.scales + room * scales;
    const int64_t together = padded_to(kQuantizeRows, panel);  // no two threads write to a panel
    run_items(kernels, ceil_div(call.rows, together), call.num_threads, 0, [&](int64_t item, void*) {
        const int64_t first = item * together, last = first + together;
        kernels.quantize(call, input, first, last < call.rows ? last : call.rows);
    });
    // Pieces of output channels wide enough to stream, and pieces of rows small enough to stay in L2, but enough of
    // both that the threads end together.
    const int64_t blocks = ceil_div(call.out_channels, 16), wanted = 4 * int64_t(call.num_threads);
    int64_t width = blocks / wanted / 4 * 4;
    if (width < 4) width = 4;
    if (width > kMostChannels / 16) width = kMostChannels / 16;
    const int64_t pieces = ceil_div(blocks, width);
    const int64_t parts = ceil_div(wanted, pieces), least_parts = ceil_div(call.rows, kMostRows / row_step * row_step);
    const int64_t rows = padded_to(ceil_div(call.rows, parts < least_parts ? least_parts : parts), row_step);
    const int64_t bytes = kernels.row_scratch * rows;
    return run_items(kernels, pieces * ceil_div(call.rows, rows), call.num_threads, bytes, [&](int64_t item, void* scratch) {
        const int64_t block = item % pieces * width, row = item / pieces * rows;
        const int64_t last_block = block + width, last_row = row + rows;
        kernels.multiply(call, input, row, last_row < call.rows ? last_row : call.rows, block,
                         last_block < blocks ? last_block : blocks, scratch);
    });
}

int32_t foveate_linear_widen(const foveate_linear* call_pointer) {
    const foveate_linear& call = *call_pointer;
    const LinearKernels& kernels = *kernels_for(call, 1);
    return run_items(kernels, ceil_div(call.out_channels, 16), call.num_threads, 0,
                     [&](int64_t item, void*) { kernels.widen(call, item); });
}
}
