// MoBA's gate: cuts a call into runs of queries and heads, and runs them on threads.
#include "gate.h"

#include "items.h"

namespace {

const GateKernels* kernels_for(const foveate_gate& call) {
#if defined(FOVEATE_BUILT_GATE_AVX512)
    if (call.isa >= FOVEATE_AVX512) return &kGateAvx512[call.dtype];
#endif
#if defined(FOVEATE_BUILT_GATE_AVX2)
    return &kGateAvx2[call.dtype];
#endif
    return nullptr;
}

}  // namespace

extern "C" {

int32_t foveate_gate_size(void) { return int32_t(sizeof(foveate_gate)); }

int32_t foveate_gate_run(const foveate_gate* call_pointer) {
    const foveate_gate& call = *call_pointer;
    const GateKernels& kernels = *kernels_for(call);
    const int64_t runs = (call.queries + kernels.columns - 1) / kernels.columns;
    const int64_t items = runs * call.kinds;
    // From the back: the last queries of a prompt have the most blocks before them.
    return run_items(NoSetup{}, items, call.num_threads, kernels.scratch(call), [&](int64_t i, void* scratch) {
        const int64_t item = items - 1 - i;
        kernels.choose(call, item / call.kinds * kernels.columns, int(item % call.kinds), scratch);
    });
}
}
