"""What an engine is made from; the HTTP server's settings and the offline API both end up here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from .settings import Settings


class _Checked(Settings):
    """The bounds of ``Settings``, and nothing from variables or files."""

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *others: Any, **rest: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """
    Args:
        model: Packaged name, local directory or hub id.
        served_model_name: Name that clients use; the model's if ``None``.
        dtype: Element type of weights and KV (see ``kv_dtype``); ``auto`` takes the checkpoint's on a GPU and on CPUs
            that multiply bfloat16 natively, float32 on the others.
        device: Torch device, or ``auto``.
        quantization: Weights of the linear layers in fewer bits, on a CPU: ``int8`` or ``int4`` (with activations of 8
            bits), ``int8wo`` or ``int4wo`` (weights only).
        page_size: Tokens per KV page; by device if ``None``.
        kv_dtype: ``int8`` keeps K and V in 8 bits with a scale per token and KV head, on a CPU; ``auto`` in ``dtype``.
        kv_cache_gib: Memory of the KV cache in GiB; a share of what is free if ``None``.
        max_context: Tokens of prompt and answer; the model's own limit if ``None``.
        max_batch_tokens: Tokens computed per step; long prompts go in chunks of this size.
        max_running: Sequences computed at once; see ``seats``.
        step_seconds: Time of a step while answers are written; chunks of prompts shrink to fit.
        max_queued_requests: Requests that may wait.
        max_queued_tokens: Prompt tokens that may wait; one request may always wait, whatever its length.
        attention: Default policy: a scheme's name, or such as ``{"scheme": "streaming", "budget_tokens": 1024}``.
        profile: Files of calibration profiles, one per scheme, or one file; those that come with the package for
            this model are found by themselves.
        prefix_reuse: Reuse pages of prompts that begin alike.
        cache_dir: Where pages of prompts are kept on disk; nowhere if ``None``.
        cache_disk_gib: Bound of the files in it, in GiB.
        cache_min_tokens: Shorter prompts are not kept on disk.
        audit_rate: Share of decode steps, 0 to 1, in which the attention mass that selections kept is
            measured, in two layers each.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        ValueError: a value is out of range; the message names each.
    """

    model: str
    served_model_name: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    quantization: Literal["none", "int8", "int8wo", "int4", "int4wo"] = "none"
    page_size: int | None = None
    kv_dtype: Literal["auto", "int8"] = "auto"
    kv_cache_gib: float | None = None
    max_context: int | None = None
    max_batch_tokens: int = 512
    max_running: int = 256
    step_seconds: float = 0.25
    max_queued_requests: int = 256
    max_queued_tokens: int = 1_000_000
    attention: str | dict[str, Any] | None = None
    profile: str | Path | Sequence[str | Path] = ()
    prefix_reuse: bool = True
    cache_dir: str | None = None
    cache_disk_gib: float = 16.0
    cache_min_tokens: int = 1
    audit_rate: float = 0.0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        given = {item.name: getattr(self, item.name) for item in fields(self)}
        given = {name: os.fspath(value) if isinstance(value, Path) else value for name, value in given.items()}
        files = given["profile"]
        given["profile"] = (files,) if isinstance(files, str) else tuple(map(str, files))
        try:
            checked = _Checked(**given)
        except ValidationError as error:
            raise ValueError("; ".join(map(_told, error.errors()))) from None
        for name in given:
            object.__setattr__(self, name, getattr(checked, name))

    @property
    def seats(self) -> int:
        """Answers written at once: ``max_running``, but no more than half of a step's tokens, so that prompts go on."""
        return min(self.max_running, max(self.max_batch_tokens // 2, 1))

    @classmethod
    def of(cls, settings: Any) -> EngineOptions:
        """Takes the fields of the same names from ``Settings``."""
        return cls(**{item.name: getattr(settings, item.name) for item in fields(cls)})


def _told(found: Any) -> str:
    """What pydantic found wrong, one of its ``errors()``."""
    if found["type"] == "value_error":
        return f"{found['loc'][0]}: {found['ctx']['error']}"
    return f"{'.'.join(map(str, found['loc']))}: {found['msg']}, got {found['input']!r}"
