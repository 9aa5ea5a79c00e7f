"""One layer's attention under each scheme beside dense, choosing keys included, on synthetic keys.

    python tests/bench/schemes_cpu.py --contexts 8192,32768 --share 0.1
    python tests/bench/schemes_cpu.py --phase prefill --contexts 8192 --share 0.15

One thread, by the time that it ran, which is steadier than the clock where others use the machine; schemes take turns,
and the table shows medians. A layer stands for the mean of ``LAYERS``, of which one in four is an anchor. Random keys
attend to everything alike: they show what a scheme costs, not what it keeps. The heads of a group agree on nothing, so
that ``top_theta`` reads about as many values as it ever will: of a group of seven at a tenth each, 52 %.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch
from tqdm import tqdm

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.view import Rows
from foveate.sparse_attn import attend as attend_module
from foveate.sparse_attn import registry
from foveate.sparse_attn.calibration.threshold_table import VARIANTS, ThresholdTable
from foveate.sparse_attn.profile import Profile
from foveate.sparse_attn.protocol import AttentionSpec, LayerCall, Phase, Scheme, StepGroup, StepState

LAYERS = 12
CPU = torch.device("cpu")


def policies(context: int, share: float) -> dict[str, dict[str, object]]:
    """Schemes with ``share`` of the context to read, and no layer dense. ``streaming`` needs a model's rotation."""
    budget, bare = int(context * share), {"sink_tokens": 0, "window_tokens": 64, "dense_tail_tokens": 0}
    free = bare | {"budget_tokens": budget - 64}
    return {
        "dense": {},
        "exact_topk": free | {"dense_first_layers": 0},
        "kascade": free | {"dense_first_layers": 0, "uncalibrated": LAYERS // 4},
        "moba": free | {"block_tokens": 128, "sparse_decode": True, "dense_last_layers": 0},
        "dhsa": free,
        "quest": free | {"dense_first_layers": 0},
        "top_theta": free | {"first_layers_budget_tokens": 0},
        "xattention": free,
    }


def thresholds(context: int, heads: int) -> Profile:
    """Of random keys: the logits of a query as long as the root of its channels are standard normal."""
    sizes = torch.tensor([context // 4, context, 4 * context])
    budgets = torch.tensor([1, *(int(context * share) for share in (0.01, 0.03, 0.1, 0.3, 0.9))])
    share = (budgets / sizes[:, None]).clamp(max=0.99).expand(LAYERS, heads, -1, -1)
    theta = 2**0.5 * torch.erfinv(1 - 2 * share)
    table = ThresholdTable(tuple(range(LAYERS)), sizes, budgets, theta, torch.zeros_like(theta))
    tensors: dict[str, torch.Tensor] = {}
    for variant in VARIANTS:
        tensors |= table.tensors(variant, torch.float32)
    return Profile("top_theta", {}, {}, "", tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", choices=["decode", "prefill"], default="decode")
    parser.add_argument("--contexts", default="8192,32768", help="keys (default: 8192,32768)")
    parser.add_argument("--share", type=float, default=0.1, help="budget over context (default: 0.1)")
    parser.add_argument("--heads", default="14,2,64", help="heads, KV heads, channels (default: 14,2,64)")
    parser.add_argument("--chunk", type=int, default=512, help="queries of a prefill (default: 512)")
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for context in map(int, given.contexts.split(",")):
        measure(given, context)


@torch.inference_mode()
def measure(given: argparse.Namespace, context: int) -> None:
    """Prints the table of one context length."""
    heads, kv_heads, channels = map(int, given.heads.split(","))
    phase = Phase.PREFILL if given.phase == "prefill" else Phase.DECODE
    schemes, profiles = {}, {"top_theta": thresholds(context, heads)}
    for name, options in policies(context, given.share).items():
        scheme = registry.build(name, profiles, **options)
        if scheme.for_phase(phase).name == name or phase is Phase.PREFILL:
            schemes[name] = scheme.for_phase(phase)
    dtype, pages = getattr(torch, given.dtype), -(-context // given.page_size)
    pool = PagePool(CacheGeometry(LAYERS, kv_heads, channels, given.page_size, pages, dtype))
    for scheme in schemes.values():
        pool.declare(scheme.page_stats(pool.geometry))
    fill(pool, context)
    queries = torch.randn(LAYERS, given.chunk if phase is Phase.PREFILL else 1, heads, channels, dtype=dtype)
    spent, chosen, read = defaultdict(list), defaultdict(list), {}
    for _ in tqdm(range(given.rounds), desc=f"{given.phase} {context}", leave=False):
        for name, scheme in schemes.items():
            with choosing() as seconds:
                start = time.thread_time()
                step = run(pool, scheme, phase, queries, context)
                spent[name].append((time.thread_time() - start) / LAYERS)
            chosen[name].append(sum(seconds) / LAYERS)
            done, dense = step.keys_read[0].tolist()
            read[name] = done / dense
    whole = median(spent["dense"])
    print(f"\n{given.phase}, {context} keys, {given.heads} {given.dtype}, load average {os.getloadavg()[0]:.1f}")
    print(f"{'scheme':12}{'keys read':>10}{'ms a layer':>12}{'of it choosing':>16}{'against dense':>15}")
    for name in schemes:
        a_layer = median(spent[name])
        ours = f"{name:12}{read[name]:10.1%}{a_layer * 1e3:12.2f}{median(chosen[name]) * 1e3:16.2f}"
        print(f"{ours}{whole / a_layer:14.2f}x")


def fill(pool: PagePool, context: int) -> None:
    """Random keys and values on all pages, written as a model's are."""
    from foveate.sparse_attn import ops

    geometry, generator = pool.geometry, torch.Generator().manual_seed(0)
    shape = (context, geometry.num_kv_heads, geometry.head_dim)
    for layer in range(LAYERS):
        key, value = (torch.randn(shape, generator=generator).to(geometry.dtype) for _ in range(2))
        ops.write_kv(key, value, pool.layer(layer), torch.arange(context))


def run(pool: PagePool, scheme: Scheme, phase: Phase, queries: torch.Tensor, context: int) -> StepState:
    """All layers of one step at the end of the context."""
    count = queries.shape[1]
    pages = -(-context // pool.geometry.page_size)
    prompt = context if phase is Phase.PREFILL else context - 1
    rows = Rows.build([list(range(pages))], [context], [count], CPU, [prompt])
    positions = torch.arange(context - count, context)
    group = StepGroup(scheme, phase, 0, rows, (0,))
    step = StepState(pool, positions, positions, [group], None, torch.zeros(1, 2, dtype=torch.float64))
    spec = AttentionSpec(pool.geometry.head_dim**-0.5)
    for layer in range(LAYERS):
        attend_module.attend(queries[layer], LayerCall(layer, spec), step)
    return step


@contextmanager
def choosing() -> Iterator[list[float]]:
    """Thread seconds spent on choosing keys within the block."""
    seconds: list[float] = []
    choose = attend_module.segments_of

    def timed(*arguments):  # type: ignore[no-untyped-def]
        start = time.thread_time()
        found = choose(*arguments)
        seconds.append(time.thread_time() - start)
        return found

    attend_module.segments_of = timed
    try:
        yield seconds
    finally:
        attend_module.segments_of = choose


if __name__ == "__main__":
    main()
