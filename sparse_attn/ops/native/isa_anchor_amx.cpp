#include "amx_engine.h"
#include "anchor.h"

namespace {
void release_tiles() { _tile_release(); }
const AnchorKernels kTable = anchor_kernels_of<AmxEngine>(configure_tiles, release_tiles);
}
extern const AnchorKernels* const kAnchorAmx = &kTable;
