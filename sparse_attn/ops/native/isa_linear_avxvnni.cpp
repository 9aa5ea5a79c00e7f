#include "linear_bytes.h"
#include "linear_lanes.h"

constexpr LinearKernels kLinearAvxVnni = ByteLinear<Lanes8<VnniDot8>>::table();
