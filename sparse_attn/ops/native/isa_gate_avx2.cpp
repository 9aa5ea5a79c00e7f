#include "gate_lanes.h"

namespace {
constexpr GateKernels kTables[2] = {Gate<Vec8, float>::kernels(), Gate<Vec8, bfloat16>::kernels()};
}
extern const GateKernels* const kGateAvx2 = kTables;
