#include "linear_dot.h"
#include "linear_lanes.h"

constexpr LinearKernels kLinearAvxVnni = DotLinear<Lanes8<VnniDot8>>::table();
