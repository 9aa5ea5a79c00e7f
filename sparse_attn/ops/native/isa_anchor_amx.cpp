#include "amx_engine.h"
#include "anchor.h"
#include "quantised.h"

namespace {
constexpr AnchorKernels kTables[2] = {
    anchor_kernels_of<AmxEngine, VectorProducts<DotRows>>(configure_tiles, release_tiles),
    anchor_kernels_of<Quantised<AmxEngine>, VectorProducts<FloatRows<Vec16, bfloat16, int8_t>>>(configure_tiles,
                                                                                                release_tiles),
};
}
extern const AnchorKernels* const kAnchorAmx = kTables;
