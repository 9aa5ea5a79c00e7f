"""What tells one model from another, for profiles that fit only the model they were made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .families import facts

# Values of each weight that enter the hash: enough to tell checkpoints apart, milliseconds for a 0.5B model.
SAMPLES = 64

_KEPT = "_foveate_fingerprint"
_THREADS = 4  # hashing lets other threads run; one does 1.1 GB/s


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """Shape, rotary parameters, and a hash over samples of the weights, as plain JSON values.

    The element type is left out: a profile made in bfloat16 serves float32 and the other way. So
    samples are rounded to bfloat16 before they are hashed. A model whose weights were quantised since has the one that
    ``keep_fingerprint`` gave it.
    """
    kept: dict[str, Any] | None = getattr(model, _KEPT, None)
    if kept is not None:
        return dict(kept)
    found = facts(model.config)
    text = model.config.get_text_config()
    rotary = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    return {
        "model_type": found.model_type,
        "num_layers": found.num_layers,
        "num_heads": found.num_heads,
        "num_kv_heads": found.num_kv_heads,
        "head_dim": found.head_dim,
        "rope": json.loads(json.dumps(rotary, sort_keys=True, default=str)),
        "weights": _hash(model),
    }


def keep_fingerprint(model: PreTrainedModel, known: dict[str, Any]) -> None:
    """Makes ``known`` the model's fingerprint from now on, whatever becomes of its weights."""
    setattr(model, _KEPT, known)


@torch.inference_mode()
def _hash(model: PreTrainedModel) -> str:
    state = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        flat = weight.reshape(-1) if weight.is_contiguous() else weight.flatten()
        step = max(1, flat.numel() // SAMPLES)
        sample = flat[::step][:SAMPLES].to(device="cpu", dtype=torch.bfloat16)
        state.update(f"{name} {tuple(weight.shape)}".encode())
        state.update(sample.view(torch.int16).numpy().tobytes())
    return state.hexdigest()


@torch.inference_mode()
def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over every parameter and buffer, quantised ones too: equal iff all weights are. Reads them all."""

    def digest(named: tuple[str, torch.Tensor]) -> bytes:
        name, tensor = named
        if tensor.is_mkldnn:  # packed: its bytes cannot be seen
            tensor = tensor.to_dense()
        state = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        if tensor.layout is not torch.strided:  # laid out for a library
            tensor = tensor.to_dense()
        state.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return state.digest()

    with ThreadPoolExecutor(_THREADS) as threads:
        found = list(threads.map(digest, _tensors(model)))
    return hashlib.sha256(b"".join(found)).hexdigest()


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from sorted(model.named_parameters())
    yield from sorted(model.named_buffers())
    for name, module in model.named_modules():
        # Weights that are no parameters: `quantize` puts them into a dataclass.
        for attribute, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield f"{name}.{attribute}", value
            elif is_dataclass(value) and not isinstance(value, type):
                for field in fields(value):
                    inner = getattr(value, field.name)
                    if isinstance(inner, torch.Tensor):
                        yield f"{name}.{attribute}.{field.name}", inner
