"""What schemes are compared with: dense attention under a mask in float64, and what a scheme read through pages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.view import PagedView, Rows
from foveate.sparse_attn import ops
from foveate.sparse_attn.attend import attend
from foveate.sparse_attn.protocol import AttentionSpec, LayerCall, Observer, Phase, Scheme, StepGroup, StepState
from foveate.sparse_attn.selection import Segment, Selection

CPU = torch.device("cpu")
# Nothing beside a scheme's own choice.
PURE = {"sink_tokens": 0, "window_tokens": 0, "dense_tail_tokens": 0}


class Text:
    """Random ``q [L, N, H, D]``, ``k`` and ``v`` ``[L, N, G, D]`` of L layers and N tokens.

    Args:
        coarse: Multiples of a quarter between -1 and 1: their products are exact in float32, and equal scores common.
    """

    def __init__(
        self,
        tokens: int,
        layers: int = 1,
        kv_heads: int = 2,
        group: int = 2,
        dim: int = 16,
        seed: int = 0,
        coarse: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(heads: int) -> torch.Tensor:
            shape = (layers, tokens, heads, dim)
            if coarse:
                return torch.randint(-4, 5, shape, generator=generator) / 4
            return torch.randn(shape, generator=generator)

        self.tokens, self.layers, self.group = tokens, layers, group
        self.q, self.k, self.v = draw(kv_heads * group), draw(kv_heads), draw(kv_heads)
        self.scale = dim**-0.5


@dataclass
class Reading:
    """What a scheme read of one text: ``out [L, T, H, D]``, and ``mask [L, H, T, N]`` unless it has thresholds."""

    out: torch.Tensor
    mask: torch.Tensor
    first: int


class Pages:
    """Texts in pages of shuffled order, NaN where nothing was written."""

    def __init__(self, scheme: Scheme | None, texts: Sequence[Text], page: int = 16) -> None:
        self.scheme, self.texts, self.page = scheme, texts, page
        self.observer: Observer | None = None  # instead of the one that makes the masks
        one = texts[0]
        needed = [-(-text.tokens // page) for text in texts]
        geometry = CacheGeometry(one.layers, one.k.shape[2], one.k.shape[3], page, sum(needed) + 2)
        self.pool = PagePool(geometry, scheme.page_stats(geometry) if scheme else ())
        for tensor in (self.pool.keys, self.pool.values):
            tensor.fill_(float("nan"))
        order = torch.randperm(geometry.num_pages, generator=torch.Generator().manual_seed(9)).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in needed]

    def read(
        self,
        spans: Sequence[tuple[int, int]],
        phase: Phase = Phase.PREFILL,
        prompts: list[int] | None = None,
        ids: list[Sequence[int]] | None = None,
    ) -> list[Reading]:
        """Positions ``start`` to ``stop - 1`` of each text, in all layers."""
        stops, counts = [b for _, b in spans], [b - a for a, b in spans]
        rows = Rows.build(self.tables, stops, counts, CPU, prompts, ids)
        places = [
            (table[i // self.page] * self.page + i % self.page, i)
            for table, (a, b) in zip(self.tables, spans, strict=True)
            for i in range(a, b)
        ]
        scheme = self.scheme and self.scheme.for_phase(phase)
        seen = _Seen()
        step = StepState(
            self.pool,
            torch.tensor([slot for slot, _ in places]),
            torch.tensor([position for _, position in places]),
            [StepGroup(scheme, phase, 0, rows, tuple(range(len(spans))))],
            None,
            torch.zeros(len(spans), 2, dtype=torch.float64),
            observer=self.observer or seen,
        )
        outs = []
        for layer in range(self.pool.num_layers):
            q, k, v = (
                torch.cat([getattr(text, name)[layer, a:b] for text, (a, b) in zip(self.texts, spans, strict=True)])
                for name in "qkv"
            )
            ops.write_kv(k, v, self.pool.layer(layer), step.slots)
            outs.append(attend(q, LayerCall(layer, AttentionSpec(self.texts[0].scale)), step))
        parts = torch.stack(outs).split(counts, dim=1)
        if self.observer:
            return []
        masks = torch.stack(seen.masks).split(counts, dim=2)
        return [
            Reading(out, mask[..., :stop], start) for out, mask, (start, stop) in zip(parts, masks, spans, strict=True)
        ]


class _Seen:
    """Keeps ``[H, T, longest]`` per layer: which keys each query could read."""

    def __init__(self) -> None:
        self.masks: list[torch.Tensor] = []

    def see(
        self,
        query: torch.Tensor,
        view: PagedView,
        layer: LayerCall,
        group: StepGroup,
        segments: Sequence[Segment],
        lse: torch.Tensor,
    ) -> None:
        rows, heads = group.rows, query.shape[1]
        positions = [
            context - count + i
            for context, count in zip(rows.host_context_lens, rows.host_query_lens, strict=True)
            for i in range(count)
        ]
        mask = torch.arange(max(rows.host_context_lens)) <= torch.tensor(positions)[:, None]
        mask = mask.expand(heads, -1, -1).clone()
        plan = segments[0].keys
        if isinstance(plan, Selection):
            plan.validate(rows)
            named = plan.to_mask(rows)
            named = named.repeat_interleave(heads // named.shape[1], dim=1)
            for row, (_, start, count, _) in enumerate(plan.tiles.host):
                mask[:, start : start + count] &= named[row, :, None]
        self.masks.append(mask)


def whole(
    scheme: Scheme | None, text: Text, page: int = 16, cuts: Sequence[int] = (), ids: Sequence[int] = ()
) -> Reading:
    """A prompt, in one piece or cut; ``ids`` are its tokens, for schemes that look at them."""
    pages, edges = Pages(scheme, [text], page), [0, *cuts, text.tokens]
    parts = [pages.read([span], prompts=[text.tokens], ids=[ids])[0] for span in itertools.pairwise(edges)]
    masks = [torch.nn.functional.pad(part.mask, (0, text.tokens - part.mask.shape[-1])) for part in parts]
    return Reading(torch.cat([part.out for part in parts], 1), torch.cat(masks, 2), 0)


def answer(scheme: Scheme, text: Text, page: int = 16, prompt: int | None = None) -> Reading:
    """The last token of a text as decode reads it, the ``prompt`` tokens of it read before."""
    pages = Pages(scheme, [text], page)
    prompt = text.tokens - 1 if prompt is None else prompt
    if prompt:
        pages.read([(0, prompt)], prompts=[prompt])
    for at in range(prompt, text.tokens - 1):
        pages.read([(at, at + 1)], Phase.DECODE, [prompt])
    return pages.read([(text.tokens - 1, text.tokens)], Phase.DECODE, [prompt])[0]


def causal(tokens: int) -> torch.Tensor:
    """``[N, N]``."""
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def logits(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """``[H, T, N]`` float64 products of ``q [T, H, D]`` and ``k [N, G, D]``, not scaled."""
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return torch.einsum("thd,nhd->htn", q.double(), keys)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """``[T, H, D]`` float64: one softmax over the keys of ``mask [H, T, N]``."""
    weights = (logits(q, k) * scale).masked_fill(~mask, float("-inf")).softmax(-1)
    values = v.double().repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return torch.einsum("htn,nhd->thd", weights, values)


def best(scores: Sequence[float], count: int, later_first: bool = False) -> list[int]:
    """Places of the ``count`` highest scores; of equal ones the lower place, or the higher.

    Raises:
        AssertionError: scores in float32 could decide otherwise, so the case tests nothing.
    """
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], -i if later_first else i))
    if 0 < count < len(order):
        gap = scores[order[count - 1]] - scores[order[count]]
        size = max(abs(scores[order[count - 1]]), 1e-12)
        assert gap == 0 or gap > 2e-6 * size, "choose another seed: scores are too close to tell"
    return order[:count]


def agrees(got: Reading, want: torch.Tensor, text: Text, layer: int = 0, atol: float = 1e-5) -> None:
    """``got`` read exactly ``want [H, N or T, N]``, and made the attention of it (float32 errors are below 3e-6)."""
    rows = got.out.shape[1]
    end = got.first + rows
    want = want[:, -rows:, :end] if want.shape[1] != rows else want[..., :end]
    differing = (got.mask[layer] != want).nonzero()
    assert not len(differing), f"{len(differing)} (head, query, key) differ, first {differing[:4].tolist()}"
    q, k, v = text.q[layer, got.first : end], text.k[layer, :end], text.v[layer, :end]
    torch.testing.assert_close(got.out[layer].double(), attention(q, k, v, want, text.scale), atol=atol, rtol=1e-5)
