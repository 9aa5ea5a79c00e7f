// Tiles for prefill only: decode waits for memory, and dot products keep up with it.
#include "amx_engine.h"
#include "decode.h"

namespace {
void release_tiles() { _tile_release(); }
const IsaKernels kTable = kernels_of<AmxEngine, DotRows>(configure_tiles, release_tiles);
}
extern const IsaKernels* const kAmxKernels = &kTable;
