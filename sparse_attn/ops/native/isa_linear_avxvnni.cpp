#include "linear_dot.h"
#include "linear_lanes.h"

const LinearKernels kLinearAvxVnni = DotLinear<Lanes8<VnniDot8>>::table();
