#include "linear_dot.h"
#include "linear_lanes.h"

constexpr LinearKernels kLinearAvx512Vnni = DotLinear<Lanes16>::table();
