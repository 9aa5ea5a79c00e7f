"""What every test shares: fixed seeds, poisoned memory, a tiny model that is built, a real one that was pulled."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: no test may reach for the network

import pytest
import torch
from hypothesis import settings
from torch.utils._device import _device_constructors

DEMO_MODEL = "smollm2-135m"
# Files that take minutes begin first, so that no process is left with one when the others are done.
LONG_FILES = ("test_triton_aot.py", "test_real_model.py", "test_packaging.py")
settings.register_profile("shared", deadline=None)  # whoever else uses the machine must not make a test fail
settings.load_profile("shared")
POISONED_ELEMENTS = 5_000_000  # larger tensors are left alone: filling them would cost time


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = make(*args, **kwargs)
        fits = tensor.dtype.is_floating_point and 0 < tensor.numel() <= POISONED_ELEMENTS
        if fits and tensor.device.type != "meta" and kwargs.get("out") is None:
            with torch.no_grad():
                tensor.fill_(torch.nan)
        return tensor

    return wrapper


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which of the compiled kernels nobody ran, since this CPU lacks what they are made of."""
    from foveate.sparse_attn.ops import native

    library = native.library()
    held = {*library.isas, *library.linear_isas} if library else set()
    if missing := [isa for isa in dict.fromkeys((*native.ISAS, *native.LINEAR_ISAS)) if isa not in held]:
        terminalreporter.write_line(f"CPU kernels that cannot run on this machine: {', '.join(missing)}")


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody wrote is NaN, not whatever happened to lie there: reading it fails a test."""
    # ``with torch.device(...)`` looks constructors up in a table that is made once: let it hold the real ones
    _device_constructors()
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> None:
    """The same number of threads everywhere, unless the caller chose."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm_dir() -> Path:
    """Directory of the demo model (SmolLM2-135M-Instruct, bfloat16). Skips where it was not pulled."""
    from foveate.server.packaged import pulled

    directory = pulled(DEMO_MODEL)
    if directory is None:
        pytest.skip(f"{DEMO_MODEL} is not here: run `foveate pull {DEMO_MODEL}`")
    return directory


@pytest.fixture(scope="session")
def tiny_llama() -> Any:
    """A random Llama: 3 layers, 4 query heads on 2 KV heads, head dim 16, 256 tokens, float32.

    All tests share it: whoever changes it puts it back.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return LlamaForCausalLM(config).eval()
