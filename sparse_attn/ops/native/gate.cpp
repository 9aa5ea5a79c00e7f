// MoBA's gate: cuts a call into runs of queries and heads, and runs them on torch's threads.
#include "gate.h"

#include <atomic>

#include "runtime.h"

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
    struct Shared {
        const foveate_gate& call;
        const GateKernels& kernels;
        std::atomic<int64_t> next;
        std::atomic<int> failed{0};
    } shared{call, kernels, {runs * call.kinds}};
    auto body = [](void* data) {
        Shared& shared = *static_cast<Shared*>(data);
        void* scratch = foveate_scratch(shared.kernels.scratch(shared.call), 0);
        if (!scratch) {
            shared.failed = 1;
            return;
        }
        // From the back: the last queries of a prompt have the most blocks before them.
        for (int64_t i; (i = shared.next.fetch_sub(1) - 1) >= 0;)
            shared.kernels.choose(shared.call, i / shared.call.kinds * shared.kernels.columns,
                                  int(i % shared.call.kinds), scratch);
    };
    const int64_t items = runs * call.kinds;
    foveate_on_threads(body, &shared, call.num_threads < items ? call.num_threads : items);
    return shared.failed;
}
}
