#include "norm_lanes.h"

namespace {
constexpr NormRows kTable[2] = {norm_rows<Vec8, float>, norm_rows<Vec8, bfloat16>};
}
extern const NormRows* const kNormAvx2 = kTable;
