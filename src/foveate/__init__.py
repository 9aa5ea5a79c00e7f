"""foveate: long contexts on Hugging Face language models, looking sharply only where it matters.

    from foveate import LLM, SamplingParams

The public names are loaded when they are first used, so ``import foveate`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foveate.patches.attach import attach
    from foveate.server.llm import LLM
    from foveate.server.request import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__", "attach"]

_HOMES = {
    "LLM": "foveate.server.llm",
    "SamplingParams": "foveate.server.request",
    "attach": "foveate.patches.attach",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
