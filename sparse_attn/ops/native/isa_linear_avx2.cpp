#include "linear_dot.h"
#include "linear_lanes.h"

constexpr LinearKernels kLinearAvx2 = DotLinear<Lanes8<WordDot>>::table();
