"""Flags of ``foveate bench``. Loads no model library, since help needs them too."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from foveate.sparse_attn import registry

from ..argument_types import one_of, policy, positive, several, share, whole
from ..settings import ENGINE_FIELDS
from .shapes import SHAPES

# Prompts are run alone, under policies of this command's own, and nothing is kept of them.
_NOT_HERE = ("max_context", "attention", "audit_rate", "cache_dir", "cache_disk_gib", "cache_min_tokens")
_ENGINE = tuple(name for name in ENGINE_FIELDS if name not in _NOT_HERE)

_SHAPES = "\n".join(
    f"  {name:<6} {shape.like}: {shape.layers} layers, {shape.heads} heads on {shape.kv_heads} KV heads of "
    f"{shape.head_dim}, {shape.vocab:,} tokens"
    for name, shape in SHAPES.items()
)
_REPORT = """
Every report names the machine, its load average, versions, threads, the model and all options. With -o it is
written as JSON, with plots if matplotlib is there (pip install 'foveate[bench]'). What is compared takes turns,
and the table shows medians, so that a slow minute of a shared machine hits everybody.
"""
_SYNTHETIC = f"""
--synthetic draws random weights of a known shape, so that no checkpoint is needed:
{_SHAPES}
Schemes that need a profile get one made from random tokens. Random weights attend to everything alike: a scheme
that reads until enough attention is reached reads nearly everything then. The keys read are in the report.
"""

BENCH = """examples:
  foveate bench latency smollm2-135m --lengths 2048,8192 --scheme dense,quest
  foveate bench latency --synthetic 0.5b --lengths 2048,4096,8192,16384,32768,65536 --max-seconds 1200 -o growth
  foveate bench throughput smollm2-135m --requests 16
  foveate bench serve --url http://127.0.0.1:8000 --rate 0.5,1,2
  foveate bench ops

`foveate bench WHAT --help` explains each.
"""

_LATENCY = (
    """\
How long until the first token, and between tokens, for one prompt alone: by length and by scheme. Then each prompt
once more under a watch that tells the share of time in attention, selection (choosing keys), linear layers, and
the rest (sampling, scheduling, and norms where layers are not fused); --no-parts leaves that out.

A run that was cut off goes on where it was if -o names the same directory. --max-seconds skips what would take
longer: a prompt is not begun if the shorter ones say that it cannot be done in time (an estimate), is cut off at
the limit otherwise, and the report says so.
"""
    + _SYNTHETIC
    + _REPORT
    + """
examples:
  foveate bench latency smollm2-135m --lengths 2048,8192 --scheme dense,quest -o latency
  foveate bench latency ./my-model --policy '{"scheme": "streaming", "budget_tokens": 1024}' --text book.txt
  foveate bench latency --synthetic 0.5b --lengths 2048,4096,8192,16384,32768,65536 --max-seconds 1200 \\
      --repeats 1 -o growth
"""
)
_THROUGHPUT = (
    """\
How many tokens per second a batch of prompts gives when all of them are there from the start: no server, no
waiting. Lengths take turns over the batch.
"""
    + _SYNTHETIC
    + _REPORT
    + """
examples:
  foveate bench throughput smollm2-135m --requests 16 --lengths 512 --new-tokens 64
  foveate bench throughput --synthetic 0.5b --requests 8 --lengths 1024,4096 --scheme dense,quest -o throughput
"""
)
_SERVE = (
    """\
What clients of a running server wait, at rates of arrival. The load is open: requests arrive at random moments (a
Poisson process, from the seed) whether or not the server has answered the ones before, as clients in the world
do. A rate that it cannot bear shows as waiting times that grow with --requests.

For each rate: time to first token (TTFT), gaps between pieces of a stream as the client sees them (ITL), time per
token after the first (TPOT), each as p50, p90 and p99; tokens per second; and goodput, the requests per second
that kept both promises: TTFT within --slo-ttft seconds and TPOT within --slo-tpot. A request that was refused
or failed breaks them.

Any server with OpenAI's completions will do; --scheme and --policy are for foveate. Prompts are random token ids
below --vocab, each another, so that no prefix cache helps.
"""
    + _REPORT
    + """
examples:
  foveate bench serve --url http://127.0.0.1:8000 --rate 0.5,1,2 --requests 60 --lengths 512 -o serve
  foveate bench serve --url http://127.0.0.1:8000 --scheme streaming --lengths 256,256,256,8192 --slo-ttft 5
"""
)
_OPS = (
    """\
Each op alone against what this machine can do, measured beside it in the same run: GFLOP/s beside a torch.mm of
2048 x 4096 x 4096 in the same element type for prompts (linear layers, prefill attention, exact scores), GB/s
beside the sum of a large tensor for decode. Decode walks through 400 MB of pages or weights, as a model does
through its layers, so no cache near the core holds them. Attention counts 4 operations per channel, query head and
visible key; scores count 2.

Kernels: native (those that read keys and values, in each instruction set of --isas), torch beside them, and
whatever the op chooses on a GPU.
"""
    + _REPORT
    + """
examples:
  foveate bench ops
  foveate bench ops --ops decode,prefill --shapes 0.5b --context 32768 -o ops
  foveate bench ops --ops prefill,decode --kv-dtype int8
  foveate bench ops --cpu-time --isas avx2,avx512        one thread, by its own time: steady on a busy machine
"""
)

# What `ops` measures: name -> what for. Each is a function in `ops_*.py`.
OPS = {
    "prefill": "attention of a chunk of a prompt",
    "decode": "attention of one new token",
    "threshold": "attention above a threshold, one new token",
    "scores": "exact scores and the best of them, a chunk of a prompt",
    "gate": "block gate over page sums, a chunk of a prompt",
    "bounds": "page bounds, one new token",
    "antidiagonal": "block scores on antidiagonals, a chunk of a prompt",
    "write": "keys and values into pages, a chunk of a prompt",
    "linear": "linear layers, plain and quantised, a chunk of a prompt and one new token",
}


@dataclass(frozen=True, slots=True)
class Mode:
    """One subcommand.

    Attributes:
        purpose: For the list of subcommands.
        help: What ``--help`` teaches.
        settings: Fields of ``Settings`` that are flags of it; with any, it takes a model.
        add: Adds its own flags.
    """

    purpose: str
    help: str
    settings: tuple[str, ...]
    add: Callable[[argparse.ArgumentParser], None]


def name_model(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Lets ``--synthetic`` stand for MODEL; ends the program if both are given."""
    if given.synthetic is None:
        if given.vocab is not None:
            parser.error("--vocab goes with --synthetic")
    elif "model" in vars(given):
        parser.error("give a MODEL or --synthetic, not both")
    elif "profile" in vars(given):
        parser.error("--profile is of a MODEL; with --synthetic profiles are made")
    elif getattr(given, "text", None) is not None:
        parser.error("--text needs a MODEL: --synthetic has no tokenizer for it, and random tokens do as well")
    else:
        given.model = f"synthetic-{given.synthetic}"


def _latency(parser: argparse.ArgumentParser) -> None:
    _add_lengths(parser, [2048, 4096, 8192], "tokens of the prompt")
    _add_schemes(parser, list(registry.names()), "all")
    _add_new_tokens(parser, 32)
    _add_repeats(parser, 3)
    parser.add_argument("--max-seconds", type=positive, metavar="X", help="skip prompts that take longer, and say so")
    parser.add_argument(
        "--parts", action=argparse.BooleanOptionalAction, default=True, help="measure the share of time per part"
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="cut prompts from it (default: random tokens)")
    _add_synthetic(parser)
    _add_common(parser)
    parser.add_argument("--fresh", action="store_true", help="forget the results in the directory")


def _throughput(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=whole, default=16, metavar="N", help="prompts in the batch (default: 16)")
    _add_lengths(parser, [512], "tokens of the prompts, which take turns")
    _add_schemes(parser, ["dense"], "dense")
    _add_new_tokens(parser, 64)
    _add_repeats(parser, 3)
    _add_synthetic(parser)
    _add_common(parser)


def _serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", required=True, help="of the server, such as http://127.0.0.1:8000")
    parser.add_argument("--model", help="name that the server knows (default: the first that it lists)")
    parser.add_argument(
        "--api-key",
        default=os.environ.get("FOVEATE_API_KEY"),
        metavar="TEXT",
        help="key to send (better in FOVEATE_API_KEY, which other users of the machine cannot read)",
    )
    parser.add_argument(
        "--rate", type=several(positive), default=[1.0], metavar="X,...", help="arrivals per second (default: 1)"
    )
    parser.add_argument("--requests", type=whole, default=50, metavar="N", help="arrivals per rate (default: 50)")
    _add_lengths(parser, [512], "tokens of the prompts, which take turns; one may be named more than once", each=False)
    _add_new_tokens(parser, 32)
    _add_schemes(parser, None, "the server's default")
    _add_repeats(parser, 1)
    parser.add_argument(
        "--slo-ttft", type=positive, default=2.0, metavar="X", help="seconds to the first token (default: 2)"
    )
    parser.add_argument(
        "--slo-tpot", type=positive, default=0.2, metavar="X", help="seconds per token after it (default: 0.2)"
    )
    parser.add_argument(
        "--timeout", type=positive, default=600.0, metavar="X", help="seconds for one answer (default: 600)"
    )
    parser.add_argument(
        "--warmup", type=int, default=1, metavar="N", help="requests before, one by one, not counted (default: 1)"
    )
    parser.add_argument("--vocab", type=whole, default=256, metavar="N", help="token ids lie below (default: 256)")
    _add_output(parser)


def _ops(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ops",
        type=several(one_of(tuple(OPS), "op")),
        default=list(OPS),
        metavar="NAME,...",
        help=f"which (default: all): {'; '.join(f'{name}, {about}' for name, about in OPS.items())}",
    )
    parser.add_argument(
        "--shapes",
        type=several(one_of(tuple(SHAPES), "shape")),
        default=["135m", "0.5b", "8b"],
        metavar="NAME,...",
        help=f"heads and layer sizes of: {', '.join(SHAPES)} (default: 135m,0.5b,8b)",
    )
    parser.add_argument("--context", type=whole, default=8192, metavar="N", help="tokens in the pages (default: 8192)")
    parser.add_argument("--queries", type=whole, default=512, metavar="N", help="of a chunk (default: 512)")
    parser.add_argument(
        "--share", type=share, default=0.1, metavar="X", help="of the keys that sparse attention reads (default: 0.1)"
    )
    parser.add_argument(
        "--dtypes",
        type=several(one_of(("bfloat16", "float32"), "element type")),
        metavar="NAME,...",
        help="bfloat16, float32 (default: bfloat16, but float32 on a CPU without products of bfloat16)",
    )
    parser.add_argument(
        "--kv-dtype", choices=("auto", "int8"), default="auto", help="of keys and values in pages (default: auto)"
    )
    parser.add_argument("--isas", type=several(str), metavar="NAME,...", help="instruction sets (default: that in use)")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, by the time that it ran")
    _add_repeats(parser, 7)
    _add_common(parser)


def _add_lengths(parser: argparse.ArgumentParser, default: list[int], what: str, each: bool = True) -> None:
    kind = several(whole) if each else lambda text: [whole(part.strip()) for part in text.split(",")]
    shown = ",".join(map(str, default))
    parser.add_argument("--lengths", type=kind, default=default, metavar="N,...", help=f"{what} (default: {shown})")


def _add_schemes(parser: argparse.ArgumentParser, default: list[str] | None, said: str) -> None:
    parser.add_argument(
        "--scheme",
        type=several(one_of(registry.names(), "scheme")),
        metavar="NAME,...",
        help=f"schemes (default: {said}, unless there is a --policy)",
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="given to every --scheme that has it"
    )
    parser.add_argument(
        "--policy", action="append", default=[], type=policy, metavar="JSON", help="a scheme with its own options"
    )
    parser.set_defaults(default_schemes=default)


def _add_new_tokens(parser: argparse.ArgumentParser, default: int) -> None:
    parser.add_argument(
        "--new-tokens", type=whole, default=default, metavar="N", help=f"tokens of an answer (default: {default})"
    )


def _add_repeats(parser: argparse.ArgumentParser, default: int) -> None:
    parser.add_argument("--repeats", type=whole, default=default, metavar="N", help=f"rounds (default: {default})")


def _add_synthetic(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--synthetic", choices=tuple(SHAPES), help="random weights of this shape instead of a MODEL")
    parser.add_argument("--vocab", type=whole, metavar="N", help="tokens of a synthetic model (default: the shape's)")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=whole, metavar="N", help="torch threads (default: torch's own choice)")
    _add_output(parser)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of weights and arrivals, and of prompts but in serve (default: 0)",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="where to write JSON and plots")


MODES = {
    "latency": Mode("time to first token and between tokens, by length and scheme", _LATENCY, _ENGINE, _latency),
    "throughput": Mode("tokens per second of a batch", _THROUGHPUT, (*_ENGINE, "max_running"), _throughput),
    "serve": Mode("what clients of a running server wait, at rates of arrival", _SERVE, (), _serve),
    "ops": Mode("each op against what the machine can do", _OPS, (), _ops),
}
