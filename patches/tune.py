"""Makes a model that is only served run faster on a CPU; what it computes stays, up to rounding."""

from __future__ import annotations

from transformers import PreTrainedModel

from foveate.sparse_attn.ops.native import library

from . import decoder_layer, fused_causal, fused_model, narrow, norm_native, packed
from .fingerprint import fingerprint, keep_fingerprint


def tune(model: PreTrainedModel) -> None:
    """Packs linear layers (bfloat16) or narrows them (float32), fuses MLPs and decoder layers, and compiles the norms.

    In place. Not for a model that is trained or saved afterwards. It keeps the fingerprint that it had. On another
    device nothing is done. Where decoder layers could be fused, the kernels of this process have threads of their own
    from now on, which only gains where they do most of the work.
    """
    if model.device.type != "cpu":
        return
    keep_fingerprint(model, fingerprint(model))
    if packed.supports(model):
        packed.pack(model)
    else:
        narrow.narrow(model)
    norm_native.replace_norms(model)
    kernels = library()
    if kernels is not None:
        decoder_layer.fuse(model)
        fused_model.fuse_model(model)
        fused_causal.fuse_causal(model)
        if any(decoder_layer.fused_layers(model)):
            kernels.keep_threads()
