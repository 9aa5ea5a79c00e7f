#include "narrow_lanes.h"

extern const NarrowBlock kNarrowAvx512 = Narrow<Vec16>::block;
