"""Saves a model of a known shape with random weights, which other programs can load: for comparing speed alone.

    python tests/bench/random_checkpoint.py 0.5b DIRECTORY

The same seed gives the same weights. The tokenizer is that of a packaged model; it needs no more tokens than the shape.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoTokenizer

from foveate.patches.synthetic import synthetic_model
from foveate.server.bench.shapes import SHAPES
from foveate.server.packaged import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("directory")
    parser.add_argument("--tokenizer", default="smollm2-135m", help="packaged name or directory (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(resolve(args.tokenizer))
    if len(tokenizer) > SHAPES[args.shape].vocab:
        parser.error(f"{args.tokenizer} has {len(tokenizer)} tokens, the shape {SHAPES[args.shape].vocab}")
    shape = SHAPES[args.shape]
    model = synthetic_model(shape.model_type, torch.bfloat16, torch.device("cpu"), args.seed, **shape.config())
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(tokenizer, name))
    model.save_pretrained(args.directory)
    tokenizer.save_pretrained(args.directory)


if __name__ == "__main__":
    main()
