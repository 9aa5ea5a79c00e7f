#include "amx_engine.h"
#include "decode_bytes.h"
#include "quantised.h"
#include "threshold.h"

namespace {
using ByteEngine = Quantised<AmxEngine>;
constexpr IsaKernels kTables[2] = {
    {
        prefill_rows<AmxEngine>,     prefill_scratch<AmxEngine>, prefill_item<AmxEngine>,   gathered_rows<AmxEngine>,
        gathered_scratch<AmxEngine>, gathered_item<AmxEngine>,   decode_scratch_on_tiles,   decode_item_on_tiles,
        decode_merge<DotProducts>,   configure_tiles,            release_tiles,
        threshold_scratch<DotProducts>, threshold_item<DotProducts>, threshold_merge<DotProducts>, threshold_partial,
    },
    {
        prefill_rows<ByteEngine>,     prefill_scratch<ByteEngine>, prefill_item<ByteEngine>,  gathered_rows<ByteEngine>,
        gathered_scratch<ByteEngine>, gathered_item<ByteEngine>,   decode_scratch_on_byte_tiles, decode_item_on_byte_tiles,
        decode_merge<ByteProducts>,   configure_tiles,             release_tiles,
        threshold_scratch<ByteProducts>, threshold_item<ByteProducts>, threshold_merge<ByteProducts>, threshold_partial,
    },
};
}
extern const IsaKernels* const kAmxKernels = kTables;
