#include "scan_lanes.h"

namespace {
constexpr ScanKernels kTables[2] = {Scan<Vec16, float>::kernels(), Scan<Vec16, bfloat16>::kernels()};
}
extern const ScanKernels* const kScanAvx512 = kTables;
