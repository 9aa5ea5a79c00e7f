#include "norm_lanes.h"

namespace {
constexpr NormRows kTable[2] = {norm_rows<Vec16, float>, norm_rows<Vec16, bfloat16>};
}
extern const NormRows* const kNormAvx512 = kTable;
