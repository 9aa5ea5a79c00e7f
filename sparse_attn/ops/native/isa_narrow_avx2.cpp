#include "narrow_lanes.h"

extern const NarrowBlock kNarrowAvx2 = Narrow<Vec8>::block;
