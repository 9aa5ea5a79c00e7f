#include "gate_lanes.h"

namespace {
constexpr GateKernels kTables[2] = {Gate<Vec16, float>::kernels(), Gate<Vec16, bfloat16>::kernels()};
}
extern const GateKernels* const kGateAvx512 = kTables;
