#include "amx_engine.h"
#include "decode_tiles.h"
#include "threshold.h"

namespace {
void release_tiles() { _tile_release(); }
const IsaKernels kTable = {
    prefill_rows<AmxEngine>,     prefill_scratch<AmxEngine>, prefill_item<AmxEngine>,   gathered_rows<AmxEngine>,
    gathered_scratch<AmxEngine>, gathered_item<AmxEngine>,   decode_scratch_on_tiles,   decode_item_on_tiles,
    decode_merge<DotProducts>,   configure_tiles,            release_tiles,
    threshold_scratch<DotProducts>, threshold_item<DotProducts>, threshold_merge<DotProducts>, threshold_partial,
};
}
extern const IsaKernels* const kAmxKernels = &kTable;
