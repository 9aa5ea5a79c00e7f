"""Which faults stay with one request, and sampling that keeps them there."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from .exceptions import RequestFailed
from .sampling import Sampled, SamplerRow, sample

log = logging.getLogger(__name__)


def raise_if_fatal(error: BaseException) -> None:
    """Raises what must end the engine again.

    A panic of a tokenizer written in Rust is no ``Exception``, and no reason to end the engine either.
    """
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        raise error


def failure(error: BaseException) -> RequestFailed:
    """What the caller of a request is told whose own work raised ``error``."""
    told = RequestFailed("the server failed at this request; others were not touched")
    told.__cause__ = error
    return told


def sample_contained(logits: Tensor, rows: Sequence[SamplerRow]) -> list[Sampled]:
    """``sample``, but a row whose processing raises gets the error alone, and the others their tokens.

    Args:
        logits: ``[S, V]``.
        rows: S rows.
    """
    if not rows:
        return []
    # Drawing moves a row's random stream on. If the batch fails half way, every stream goes back to where it was,
    # so that the second try draws what the first would have. Reading a state takes 0.6 us.
    streams = [row.stream_state() for row in rows]
    try:
        return sample(logits, rows)
    except BaseException as error:
        raise_if_fatal(error)
        log.exception("sampling a batch failed; its rows are sampled one by one")
    for row, state in zip(rows, streams, strict=True):
        row.restore_stream(state)
    return [_sample_one(logits[index : index + 1], row) for index, row in enumerate(rows)]


def _sample_one(logits: Tensor, row: SamplerRow) -> Sampled:
    try:
        return sample(logits, [row])[0]
    except BaseException as error:
        raise_if_fatal(error)
        log.exception("sampling one request failed")
        return Sampled(-1, error=failure(error))


def check_device(device: torch.device) -> None:
    """Asks the device for a sign of life: after some faults of a GPU every later call fails too.

    Raises:
        RuntimeError: the device gives none.
    """
    if int(torch.ones(2, dtype=torch.int32, device=device).sum()) != 2:
        raise RuntimeError(f"{device} does not compute any more")
