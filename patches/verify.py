"""Does a model give the same logits on our attention as on its own?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from foveate.kv_cache.geometry import CacheGeometry, default_page_size
from foveate.kv_cache.manager import KVCacheManager
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.table import BlockTable

from .attach import attach_engine
from .errors import UnsupportedModel
from .families import ModelFacts, facts
from .interface import PackedStep
from .step import build_step

# Bounds on the root mean square of the difference over that of the logits. Over tiny random models of
# twelve families, stock eager and stock sdpa attention differ by 1e-6 in float32, 3e-3 in float16 and
# 2e-2 in bfloat16, and experts that a router swaps on a near tie add up to 8e-2. So float32 shows any
# fault, half precision the gross ones: a lost window, soft cap or neighbour is 0.3 and more.
TOLERANCES = {torch.float32: 2e-4, torch.float16: 0.1, torch.bfloat16: 0.1}

PROMPT_TOKENS, DECODE_TOKENS, NEIGHBOUR_TOKENS = 70, 3, 41

# Tokens of a pass that is only tried.
TRIED_TOKENS = 6

# Last tokens of each chunk whose logits are compared: a large vocabulary costs more than the layers.
COMPARED_TOKENS = 64

# Longest sliding window that is worth a longer prompt.
LONGEST_WINDOW = 1024


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """
    Attributes:
        model_type: The family.
        dtype: Element type of the comparison, the model's own.
        tolerance: Bound on each difference.
        differences: Way of running -> root mean square of (ours - stock) over that of stock; infinite for NaN.
        error: What was raised, or empty.
        untested_window: A sliding window longer than the prompts here, or ``None``.
    """

    model_type: str
    dtype: torch.dtype
    tolerance: float
    differences: dict[str, float]
    error: str = ""
    untested_window: int | None = None

    @property
    def largest(self) -> float:
        """The largest difference."""
        return max(self.differences.values(), default=0.0)

    @property
    def passed(self) -> bool:
        return not self.error and self.largest <= self.tolerance

    def __str__(self) -> str:
        lines = [f"{name}: relative difference {value:.1e}" for name, value in self.differences.items()]
        if self.error:
            lines.append(f"error: {self.error}")
        if self.untested_window is not None:
            lines.append(f"sliding window of {self.untested_window} tokens: longer than the test, not exercised")
        verdict = "passed" if self.passed else "FAILED"
        lines.append(
            f"{self.model_type} in {str(self.dtype).removeprefix('torch.')}: {verdict} at {self.tolerance:.0e}"
        )
        return "\n".join(lines)

    def raise_on_failure(self) -> None:
        """
        Raises:
            UnsupportedModel: the comparison failed.
        """
        if not self.passed:
            raise UnsupportedModel(
                f"{self.model_type} does not give the same logits on paged attention as on its own:\n{self}"
            )


@torch.inference_mode()
def verify(model: PreTrainedModel, change: Callable[[PreTrainedModel], None] | None = None) -> VerifyReport:
    """Compares logits on random tokens: one-shot, chunked prefill, decode, and two sequences in one row.

    Args:
        model: Not attached. Its attention implementation is as before afterwards.
        change: What else is done to the model, for good, once its stock logits are known: ``tune``.

    Raises:
        UnsupportedModel: its config rules it out already.
        AttachError: the model is attached.
    """
    known = facts(model.config)
    longest = max((window for window in known.windows if window), default=0)
    prompt = PROMPT_TOKENS + (longest if longest <= LONGEST_WINDOW else 0)
    generator = torch.Generator().manual_seed(0)
    first, second = (
        torch.randint(known.vocab_size, (length,), generator=generator).to(model.device)
        for length in (prompt + DECODE_TOKENS, NEIGHBOUR_TOKENS)
    )
    differences: dict[str, float] = {}
    error = ""
    training = model.training
    model.train(False)
    try:
        stock = _stock(model, first, second)
        if change is not None:
            change(model)
        with attach_engine(model):
            try:
                _compare(_Packed(model, known, len(first)), first, second, *stock, differences)
            except Exception as failure:  # whatever goes wrong under our attention is the answer sought
                error = f"{type(failure).__name__}: {failure}"
    finally:
        model.train(training)
    return VerifyReport(
        model_type=known.model_type,
        dtype=model.dtype,
        tolerance=TOLERANCES.get(model.dtype, TOLERANCES[torch.bfloat16]),
        differences=differences,
        error=error,
        untested_window=longest if longest > LONGEST_WINDOW else None,
    )


@torch.inference_mode()
def try_pass(model: PreTrainedModel) -> None:
    """Runs a few tokens as the engine does: what only fails on our attention fails here, and not in every request.

    Args:
        model: Not attached.

    Raises:
        UnsupportedModel: it failed.
        AttachError: the model is attached.
    """
    known = facts(model.config)
    ids = torch.arange(TRIED_TOKENS, device=model.device) % known.vocab_size
    with attach_engine(model):
        try:
            packed = _Packed(model, known, TRIED_TOKENS)
            table = packed.open()
            for part in (ids[:-1], ids[-1:]):
                packed.logits((table, part), kept=[len(part) - 1])
        except Exception as failure:
            raise UnsupportedModel(
                f"{known.model_type} does not run on paged attention: {type(failure).__name__}: {failure}"
            ) from failure


def _stock(model: PreTrainedModel, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    text = model.config.get_text_config()
    configs = [model.config] if text is model.config else [model.config, text]
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = "eager"
        first_logits, second_logits = (model(input_ids=ids[None], use_cache=False).logits[0] for ids in (first, second))
        return first_logits, second_logits
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation


class _Packed:
    """Runs steps as the engine does."""

    def __init__(self, model: PreTrainedModel, known: ModelFacts, tokens: int) -> None:
        size = default_page_size(model.device)
        pages = 4 + 2 * (tokens // size + 1)
        geometry = CacheGeometry(
            known.num_layers, known.num_kv_heads, known.head_dim, size, pages, model.dtype, model.device
        )
        self.model = model
        self.manager = KVCacheManager(PagePool(geometry), prefix_reuse=False)

    def open(self) -> BlockTable:
        return self.manager.open([], b"")

    def run(self, stock: torch.Tensor, *chunks: tuple[BlockTable, torch.Tensor]) -> float:
        """Difference to the stock logits ``[T, vocab]`` of the same tokens, over the last ones of each chunk."""
        kept: list[int] = []
        start = 0
        for _, ids in chunks:
            kept += range(start + max(0, len(ids) - COMPARED_TOKENS), start + len(ids))
            start += len(ids)
        return _difference(self.logits(*chunks, kept=kept).float(), stock[kept].float())

    def logits(self, *chunks: tuple[BlockTable, torch.Tensor], kept: list[int]) -> torch.Tensor:
        """Logits ``[N, vocab]`` of those rows."""
        step = build_step(self.manager, [(table, len(ids)) for table, ids in chunks], None)
        row = torch.cat([ids for _, ids in chunks])
        output = self.model(
            input_ids=row[None],
            position_ids=step.positions[None],
            use_cache=False,
            logits_to_keep=torch.tensor(kept, device=row.device),
            foveate_step=PackedStep(step),
        )
        for table, ids in chunks:
            self.manager.commit(table, range(table.num_tokens + len(ids)))
        logits: torch.Tensor = output.logits[0]
        return logits


def _compare(
    packed: _Packed,
    first: torch.Tensor,
    second: torch.Tensor,
    stock_first: torch.Tensor,
    stock_second: torch.Tensor,
    differences: dict[str, float],
) -> None:
    end = len(first) - DECODE_TOKENS
    cut = end * 33 // 70
    table = packed.open()
    differences["one-shot prefill"] = packed.run(stock_first[:end], (table, first[:end]))
    packed.manager.free(table)

    table = packed.open()
    parts = (slice(0, cut), slice(cut, end))
    differences["chunked prefill"] = max(packed.run(stock_first[part], (table, first[part])) for part in parts)
    places = [slice(place, place + 1) for place in range(end, len(first))]
    differences["decode"] = max(packed.run(stock_first[place], (table, first[place])) for place in places)
    packed.manager.free(table)

    both = torch.cat([stock_first[:end], stock_second])
    differences["two packed sequences"] = packed.run(both, (packed.open(), first[:end]), (packed.open(), second))


def _difference(ours: torch.Tensor, stock: torch.Tensor) -> float:
    ratio = ((ours - stock).square().mean() / stock.square().mean()).sqrt()
    return float(ratio.nan_to_num(nan=float("inf")))
