"""MoBA's gate in torch: one matrix product and one partial sort per slab of queries."""

from __future__ import annotations

import torch

from foveate.kv_cache.stats import KEY_SUM
from foveate.kv_cache.view import PagedView

from .topk import top_units

# Scores held at once; measured, slabs that stay in the caches are the fastest.
_SLAB_BYTES = 8 * 2**20
# Pages whose keys are widened at once, where no page sums are kept.
_SLAB_PAGES = 256


def gate_blocks(
    query: torch.Tensor,
    view: PagedView,
    block_tokens: int,
    top_k: int,
    candidates: tuple[torch.Tensor, torch.Tensor],
    pooled: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``ops.gate_blocks``. Beside the result it holds one sequence's means and 8 MiB of scores, a few times."""
    kv_heads, rows = view.num_kv_heads, view.rows
    kinds = kv_heads if pooled else query.shape[1]
    indices = torch.full((query.shape[0], kinds, top_k), -1, dtype=torch.int32, device=query.device)
    counts = torch.ones(query.shape[0], kinds, dtype=torch.int32, device=query.device)
    start = 0
    for sequence, (context, count) in enumerate(zip(rows.host_context_lens, rows.host_query_lens, strict=True)):
        blocks = (context - 1) // block_tokens
        means = block_means(view, sequence, block_tokens, blocks)
        step = max(1, _SLAB_BYTES // (4 * kinds * max(blocks, 1)))
        for begin in range(0, count, step):
            stop = min(begin + step, count)
            part = slice(start + begin, start + stop)
            # Blocks behind the slab's last query are no candidates of any of its queries.
            seen = (context - count + stop - 1) // block_tokens
            edges = candidates[0][part], candidates[1][part]
            _slab(query[part], means[:, :seen], top_k - 1, edges, indices[part], counts[part])
        own = torch.arange(context - count, context, dtype=torch.int32, device=query.device) // block_tokens
        part = slice(start, start + count)
        # The own block comes after all others: its place is the last.
        indices[part].scatter_(2, (counts[part] - 1)[..., None].long(), own[:, None, None].expand(-1, kinds, 1))
        start += count
    return indices, counts


def _slab(
    query: torch.Tensor,
    means: torch.Tensor,
    most: int,
    candidates: tuple[torch.Tensor, torch.Tensor],
    indices: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Writes the past blocks of queries ``[n, H, D]`` to ``indices [n, K, top_k]``; adds their number to ``counts``."""
    (tokens, heads, dim), (kv_heads, blocks, _) = query.shape, means.shape
    kinds = indices.shape[1]
    if not blocks or not most:
        return
    asked = query.float().view(tokens, kv_heads, heads // kv_heads, dim)
    if kinds == kv_heads:
        asked = asked.sum(2, keepdim=True)
    asked = asked.permute(1, 0, 2, 3).reshape(kv_heads, -1, dim)
    gates = torch.bmm(asked, means.transpose(1, 2)).view(kv_heads, tokens, -1, blocks).transpose(0, 1)
    gates = gates.reshape(tokens, kinds, blocks)
    if gates.is_cuda:
        picked, found = top_units(gates, candidates, most, ties="higher")
        indices[..., : picked.shape[-1]] = picked
    else:
        chosen, found = _best(gates, candidates, most)
        row, place = chosen.reshape(-1, blocks).nonzero().unbind(1)
        flat = found.flatten().long()
        rank = torch.arange(len(row)) - (flat.cumsum(0) - flat)[row]
        indices.view(tokens * kinds, -1)[row, rank] = place.int()
    counts += found


def _best(
    gates: torch.Tensor, candidates: tuple[torch.Tensor, torch.Tensor], most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same choice as ``top_units``, in half its time: a mask ``[n, K, U]``, and how many it holds of each row."""
    block = torch.arange(gates.shape[2])
    allowed = ((block >= candidates[0][:, None]) & (block < candidates[1][:, None]))[:, None]
    if most >= len(block):
        chosen = allowed.expand_as(gates)
        return chosen, chosen.sum(-1, dtype=torch.int32)
    gates.masked_fill_(~allowed, float("-inf"))
    least = gates.topk(most, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    chosen = (gates >= least) & allowed
    found = chosen.sum(-1, dtype=torch.int32)
    tied = (found > most).any(1)
    if bool(tied.any()):  # few rows: several gates equal the least that is chosen
        edges = candidates[0][tied], candidates[1][tied]
        picked, found[tied] = top_units(gates[tied], edges, most, ties="higher")
        exact = torch.zeros(*picked.shape[:2], len(block) + 1, dtype=torch.bool)
        exact.scatter_(2, torch.where(picked < 0, len(block), picked).long(), True)
        chosen[tied] = exact[..., : len(block)]
    return chosen, found


def block_means(view: PagedView, sequence: int, block_tokens: int, blocks: int) -> torch.Tensor:
    """Means ``[G, blocks, D]`` float32 of the keys of the first ``blocks`` blocks, each of them full."""
    pages_needed = -(-blocks * block_tokens // view.page_size)
    pages = view.rows.block_tables[sequence, :pages_needed].long()
    if KEY_SUM in view.pages.stats and block_tokens % view.page_size == 0:
        sums = view.pages.stats[KEY_SUM][pages]
        sums = sums.view(blocks, block_tokens // view.page_size, *sums.shape[1:]).sum(1)
        return sums.div_(block_tokens).transpose(0, 1)
    # A block that is part of a page or of pages without sums: from the keys, a few pages at a time.
    per_page, per_block = max(view.page_size // block_tokens, 1), max(block_tokens // view.page_size, 1)
    means = []
    step = max(_SLAB_PAGES, per_block)
    for begin in range(0, len(pages), step):
        keys = view.pages.key_rows()[pages[begin : begin + step]].float()
        keys = keys.view(-1, per_block, view.num_kv_heads, per_page, view.page_size // per_page, view.head_dim)
        means.append(keys.mean(dim=(1, 4)).transpose(0, 1).flatten(1, 2))
    if not means:
        return torch.zeros(view.num_kv_heads, 0, view.head_dim, device=pages.device)
    return torch.cat(means, dim=1)[:, :blocks]
