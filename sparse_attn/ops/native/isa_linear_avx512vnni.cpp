#include "linear_bytes.h"
#include "linear_lanes.h"

constexpr LinearKernels kLinearAvx512Vnni = ByteLinear<Lanes16>::table();
