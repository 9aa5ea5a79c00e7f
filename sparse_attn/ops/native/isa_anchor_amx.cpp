#include "amx_engine.h"
#include "anchor.h"
#include "quantised.h"

namespace {
void release_tiles() { _tile_release(); }
constexpr AnchorKernels kTables[2] = {
    anchor_kernels_of<AmxEngine>(configure_tiles, release_tiles),
    anchor_kernels_of<Quantised<AmxEngine>>(configure_tiles, release_tiles),
};
}
extern const AnchorKernels* const kAnchorAmx = kTables;
