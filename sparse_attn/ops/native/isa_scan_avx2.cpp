#include "scan_lanes.h"

namespace {
constexpr ScanKernels kTables[2] = {Scan<Vec8, float>::kernels(), Scan<Vec8, bfloat16>::kernels()};
}
extern const ScanKernels* const kScanAvx2 = kTables;
