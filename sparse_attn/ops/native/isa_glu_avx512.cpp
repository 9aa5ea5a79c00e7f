#include "glu_lanes.h"

namespace {
constexpr GluRows kTable[2] = {glu_rows<Vec16, float>, glu_rows<Vec16, bfloat16>};
}
extern const GluRows* const kGluAvx512 = kTable;
