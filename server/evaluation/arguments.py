"""Flags of ``foveate eval``. Loads no model library, since help needs them too."""

from __future__ import annotations

import argparse
from pathlib import Path

from foveate.sparse_attn import registry

from ..argument_types import one_of, policy, several, share, whole
from .tasks import TASKS

# Settings that make sense here; prefix reuse is off, and the policies are this command's own matter.
SETTINGS = (
    "dtype",
    "device",
    "quantization",
    "page_size",
    "kv_dtype",
    "kv_cache_gib",
    "max_batch_tokens",
    "profile",
    "audit_rate",
    "trust_remote_code",
)

EXAMPLES = f"""\
Every prompt is made here from the seed: a document of --lengths tokens, answers included,
facts planted in it, and at its end the beginning of a sentence that only such a fact completes. A fact
counts as found if the greedy answer contains it. Dense attention always runs beside the others: what it
does not find says something of the model, not of a scheme. Agreement is with dense attention over keys and
values in full: what --kv-dtype int8 costs is the line of dense.

tasks:
{chr(10).join(f"  {name:<18} {task.about}" for name, task in TASKS.items())}

The directory gets results.json, a heat map (length x depth) per scheme, an overview of all schemes per task,
and trials.jsonl with every answer. Trials found there are not run again, so a run that was cut off, or one
with more samples, lengths or schemes, goes on where the last one was.

A scheme named by --scheme runs without its dense tail: the tail would read the question whole, and a scheme
whose answers are dense would then find whatever dense attention finds.

examples:
  foveate eval smollm2-135m --scheme streaming -o results
  foveate eval smollm2-135m --tasks needle,agreement --lengths 4096 --budgets 512 --samples 2 -o results
  foveate eval ./my-model --policy '{{"scheme": "streaming", "budget_tokens": 1024, "sink_tokens": 64}}' -o results
  foveate eval ./my-model --option dense_tail_tokens=128 --audit-rate 0.5 -o results
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that only this command has."""
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="where the results are kept")
    parser.add_argument(
        "--scheme",
        type=several(one_of(registry.names(), "scheme")),
        metavar="NAME,...",
        help="schemes to compare with dense (default: all, unless there is a --policy)",
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="given to every --scheme that has it"
    )
    parser.add_argument(
        "--policy", action="append", default=[], type=policy, metavar="JSON", help="a scheme with its own options"
    )
    parser.add_argument(
        "--budgets",
        type=several(whole),
        default=[256, 512, 1024],
        metavar="N,...",
        help="budget_tokens of every policy that has them and says nothing itself (default: 256,512,1024)",
    )
    parser.add_argument(
        "--tasks",
        type=several(one_of(tuple(TASKS), "task")),
        default=list(TASKS),
        metavar="NAME,...",
        help="what to do (default: all)",
    )
    parser.add_argument(
        "--lengths",
        type=several(whole),
        default=[2048, 4096, 8192],
        metavar="N,...",
        help="tokens of prompt and answer (default: 2048,4096,8192); those beyond the context are left out",
    )
    parser.add_argument(
        "--depths",
        type=several(share),
        default=[0.1, 0.35, 0.65, 0.9],
        metavar="X,...",
        help="where facts stand, 0 is the beginning of the document; multiquery plants one at each "
        "(default: 0.1,0.35,0.65,0.9)",
    )
    parser.add_argument("--samples", type=whole, default=4, metavar="N", help="prompts per cell (default: 4)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="makes other prompts (default: 0)")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="for perplexity and agreement (default: Python's reference manual)"
    )
    parser.add_argument("--fresh", action="store_true", help="forget the results in the directory")


def schemes_of(given: argparse.Namespace) -> list[str]:
    """The schemes that ``--scheme`` names, or that its absence means."""
    if given.scheme is not None:
        return list(given.scheme)
    return [] if given.policy else list(registry.names())
