#include "glu_lanes.h"

namespace {
constexpr GluRows kTable[2] = {glu_rows<Vec8, float>, glu_rows<Vec8, bfloat16>};
}
extern const GluRows* const kGluAvx2 = kTable;
