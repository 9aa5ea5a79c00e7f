"""OpenVINO GenAI's side of a comparison: answers prompts as ``turns`` says. Started by ``compare_peers.py``.

Runs in an environment of its own, which has ``openvino-genai`` and not necessarily anything of ours.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai

# What the library prints goes to standard error: events are lines of their own.
EVENTS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def tell(event: str, **more: object) -> None:
    print(json.dumps({"event": event, **more}), file=EVENTS, flush=True)


class Watch(genai.StreamerBase):
    """Tells of the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.told = False

    def write(self, token: object) -> Any:
        if not self.told:
            self.told = True
            tell("first")
        return genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of the exported model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--cache-gib", type=int, required=True, help="of keys and values")
    parser.add_argument("--mode", choices=("dense", "trishape"), default="dense")
    args = parser.parse_args()
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = 2048
    scheduler.enable_prefix_caching = False
    scheduler.cache_size = args.cache_gib
    if args.mode == "trishape":
        scheduler.use_sparse_attention = True
        scheduler.sparse_attention_config = genai.SparseAttentionConfig(
            mode=genai.SparseAttentionMode.TRISHAPE,
            num_last_dense_tokens_in_prefill=100,
            num_retained_start_tokens_in_cache=128,
            num_retained_recent_tokens_in_cache=1920,
        )
    pipe = genai.LLMPipeline(args.model, "CPU", {"scheduler_config": scheduler, "INFERENCE_NUM_THREADS": args.threads})
    tell("ready")
    for line in sys.stdin:
        prompt = json.loads(Path(line.strip()).read_text())
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = prompt["new_tokens"]
        config.ignore_eos, config.do_sample, config.apply_chat_template = True, False, False
        row = openvino.Tensor(np.array([prompt["ids"]], dtype=np.int64))
        tell("last", ids=list(pipe.generate(row, config, Watch()).tokens[0]))


if __name__ == "__main__":
    main()
