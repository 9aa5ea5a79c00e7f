"""Dense attention over pages on NVIDIA GPUs, through the kernels of flashinfer (Ye et al., 2025, arXiv:2501.01005).

flashinfer takes FlashAttention-2 or -3, whichever suits the card, and compiles what it needs at first use (minutes,
once per machine). It plans on the host: a plan is made once per step for each band and kept for the other layers.
"""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from shutil import which
from typing import Any

import torch

from foveate.kv_cache.view import PagedView

from ..protocol import AttentionSpec
from ..selection import Selection
from .attention_torch import Result, with_sinks

logger = logging.getLogger(__name__)

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128, 256)
MIN_CAPABILITY = (8, 0)
# What flashinfer recommends; split-KV partials take 4 bytes x 2 blocks per SM x 128 rows x D, 40 MB at most.
WORKSPACE_BYTES = 128 * 2**20
# Its documentation advises tensor cores for large groups. The other kernel lacks 5, 7 and more, but knows 1, 2 and 3.
TENSOR_CORE_GROUP = 4
# The merge gives a token one block, with all its heads.
MAX_THREADS = 1024
LN2 = math.log(2)  # flashinfer's log-sum-exp has base 2

# Plans whose copy to the device may not have run yet; see `_hold`. The only other state here is `_workspace`.
_copying: deque[tuple[Any, Any]] = deque()  # (event, wrapper)


@cache
def library() -> Any:
    """flashinfer. Loaded by name, so that types are checked alike with and without it."""
    return import_module("flashinfer")


@cache
def available(device: torch.device) -> bool:
    """Whether flashinfer is installed and runs on ``device``. If it is installed and cannot, the log says why, once."""
    if device.type != "cuda" or torch.version.hip or find_spec("flashinfer") is None:
        return False
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return False
    if not _has_compiler():
        logger.warning("flashinfer is not used: it compiles its kernels, and nvcc was not found")
        return False
    try:
        library()
    except (ImportError, OSError) as error:
        logger.warning("flashinfer is not used: it does not load (%s)", error)
        return False
    return True


def supports(query: torch.Tensor, view: PagedView, selection: Selection | None, spec: AttentionSpec) -> bool:
    """Whether flashinfer has a kernel for this call. Any page size will do."""
    return (
        selection is None
        and query.dtype in DTYPES
        and view.pages.keys.dtype == query.dtype
        and view.head_dim in HEAD_DIMS
        and spec.band.nearest == 0
        and spec.band.farthest != 0
    )


def prefill(query: torch.Tensor, view: PagedView, selection: Selection | None, spec: AttentionSpec) -> Result:
    """See ``ops.prefill``.

    Raises:
        ValueError: not ``supports(...)``.
    """
    return _attention(query, view, selection, spec, _plan_prefill)


def decode(query: torch.Tensor, view: PagedView, selection: Selection | None, spec: AttentionSpec) -> Result:
    """See ``ops.decode``.

    Raises:
        ValueError: not ``supports(...)``.
    """
    return _attention(query, view, selection, spec, _plan_decode)


def can_merge(out: torch.Tensor) -> bool:
    """Whether ``merge`` takes parts like ``out [T, H, D]``."""
    _, heads, dim = out.shape
    fits = dim in HEAD_DIMS and heads * dim // 8 <= MAX_THREADS
    return fits and out.dtype in DTYPES and available(out.device)


def merge(first: Result, second: Result, sinks: torch.Tensor | None) -> Result:
    """See ``ops.merge``; of two parts."""
    states = [tensor.contiguous() for out, lse in (first, second) for tensor in (out, lse / LN2)]
    out, lse = library().merge_state(*states)
    return with_sinks(out, lse * LN2, AttentionSpec(scale=1.0, sinks=sinks))


def _attention(
    query: torch.Tensor,
    view: PagedView,
    selection: Selection | None,
    spec: AttentionSpec,
    plan: Callable[[torch.Tensor, PagedView, AttentionSpec], Any],
) -> Result:
    if not supports(query, view, selection, spec):
        raise ValueError("flashinfer has no kernel for this selection, element type, head size or band")
    key = (plan, spec.band, spec.scale, spec.softcap, query.dtype, query.shape[1])
    wrapper = view.rows.plans.get(key)
    if wrapper is None:
        wrapper = view.rows.plans[key] = plan(query, view, spec)
        _hold(wrapper, query.device)
    out, lse = wrapper.run(query, (view.pages.keys, view.pages.values), return_lse=True)
    return with_sinks(out, lse * LN2, spec)


def _plan_prefill(query: torch.Tensor, view: PagedView, spec: AttentionSpec) -> Any:
    wrapper = library().BatchPrefillWithPagedKVCacheWrapper(_workspace(query.device), "HND")
    offsets = _host(accumulate(view.rows.host_query_lens, initial=0), query.device)
    sizes = query.shape[1], view.num_kv_heads, view.head_dim, view.page_size
    wrapper.plan(offsets, *_page_table(view), *sizes, causal=True, **_options(query, spec))
    return wrapper


def _plan_decode(query: torch.Tensor, view: PagedView, spec: AttentionSpec) -> Any:
    wrapper = library().BatchDecodeWithPagedKVCacheWrapper(
        _workspace(query.device),
        "HND",
        use_tensor_cores=query.shape[1] // view.num_kv_heads >= TENSOR_CORE_GROUP,
    )
    sizes = query.shape[1], view.num_kv_heads, view.head_dim, view.page_size
    wrapper.plan(*_page_table(view), *sizes, **_options(query, spec))
    return wrapper


def _options(query: torch.Tensor, spec: AttentionSpec) -> dict[str, Any]:
    return {
        "sm_scale": spec.scale,
        "logits_soft_cap": spec.softcap,
        # The distance of the farthest key that is still seen; -1 sees all.
        "window_left": -1 if spec.band.farthest is None else spec.band.farthest - 1,
        "q_data_type": query.dtype,
        "kv_data_type": query.dtype,
    }


def _page_table(view: PagedView) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Offsets ``[S + 1]`` into the pages ``[sum]`` of all sequences, and keys in each one's last page ``[S]``.

    A sequence may own more pages than its context fills so far; flashinfer counts keys by pages, so these stay out.
    """
    rows, size = view.rows, view.page_size
    used = [-(-context // size) for context in rows.host_context_lens]
    pages = (page for table, count in zip(rows.host_block_tables, used, strict=True) for page in table[:count])
    last = (context - max(count - 1, 0) * size for context, count in zip(rows.host_context_lens, used, strict=True))
    device = view.pages.keys.device
    return _host(accumulate(used, initial=0), device), _host(pages, device), _host(last, device)


def _host(numbers: Iterable[int], device: torch.device) -> torch.Tensor:
    """int32 on the host, where flashinfer plans; pinned, so that its own copy to ``device`` does not wait."""
    return torch.tensor(list(numbers), dtype=torch.int32, pin_memory=device.type == "cuda")


def _hold(wrapper: Any, device: torch.device) -> None:
    """Keeps a plan until it has been copied to the device.

    It is copied from pinned memory that the wrapper owns, unknown to torch's allocator. Were the wrapper dropped
    while the device lags behind, the next plan could be written over it.
    """
    if device.type != "cuda":
        return
    while _copying and _copying[0][0].query():
        _copying.popleft()
    make_event: Any = torch.cuda.Event  # torch leaves it untyped
    copied = make_event()
    copied.record(torch.cuda.current_stream(device))
    _copying.append((copied, wrapper))


@cache
def _workspace(device: torch.device) -> torch.Tensor:
    """Scratch of split-KV, one per device and never freed: kernels of one stream take turns."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _has_compiler() -> bool:
    if find_spec("flashinfer_jit_cache") is not None or which("nvcc") is not None:
        return True
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return Path(home, "bin", "nvcc").exists()
