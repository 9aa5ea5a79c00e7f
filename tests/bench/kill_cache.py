"""Kills `foveate serve --cache-dir` while it writes documents, and looks for pages that are not what was computed.

    .venv/bin/python tests/bench/kill_cache.py              # 20 kills, documents of 2,000 tokens, a random model
    .venv/bin/python tests/bench/kill_cache.py --model smollm2-135m --tokens 1500

Each round starts the server, asks for the document of the round before (of which some pages are on disk), asks for a
new one, and sends SIGKILL within the time that writing it takes. Answers are compared with those of a server without
a cache. At the end one server is asked for all documents. Exits with 1 if an answer differs or a file is damaged.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from serving import Server


def make_model(path: Path) -> str:
    """A random llama with 64 KiB of keys and values per token."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=128, intermediate_size=128, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=8192, eos_token_id=256, bos_token_id=None,
        pad_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(path)
    return str(path)


def prompt_of(number: int, tokens: int) -> list[int]:
    rng = random.Random(number)
    return [rng.randrange(256) for _ in range(tokens)]


def answer(server: Server, prompt: list[int]) -> tuple[str, int]:
    """Text and cached tokens."""
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    told = server.ask("/v1/completions", body)
    return told["choices"][0]["text"], told["usage"]["prompt_tokens_details"]["cached_tokens"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="packaged name or directory (default: a random one)")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=2000, help="of each document")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    wrong = damaged = parts = cached = 0
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model = given.model or make_model(folder / "model")
        prompts = [prompt_of(number, given.tokens) for number in range(given.kills)]
        cache = folder / "cache"
        flags = ("--dtype", "float32", "--kv-cache-gib", "1")
        server = Server(model, folder / "log", *flags)
        expected = [answer(server, prompt)[0] for prompt in prompts]
        server.end()
        flags += ("--cache-dir", str(cache))
        for number in range(given.kills):
            server = Server(model, folder / "log", *flags)
            if number:
                text, hit = answer(server, prompts[number - 1])
                wrong += text != expected[number - 1]
                cached += hit
            text, _ = answer(server, prompts[number])
            wrong += text != expected[number]
            damaged += int(server.metric("foveate_disk_corrupt_files_total"))
            time.sleep(rng.uniform(0, 0.4))
            server.end(kill=True)
            left = list(cache.glob("*/.*.part"))
            parts += len(left)
            print(f"kill {number + 1}: {len(list(cache.glob('*/*.run')))} files, {len(left)} torn")
        server = Server(model, folder / "log", *flags)
        found = [answer(server, prompt) for prompt in prompts]
        wrong += sum(text != want for (text, _), want in zip(found, expected, strict=True))
        cached += sum(hit for _, hit in found)
        damaged += int(server.metric("foveate_disk_corrupt_files_total"))
        server.end()
        left = list(cache.glob("*/.*.part"))
    print(f"{given.kills} kills, {parts} within a write: {wrong} wrong answers, {damaged} damaged files,")
    print(f"{cached} tokens from disk, {len(left)} torn files left after the last start")
    return 1 if wrong or damaged or left or not cached else 0


if __name__ == "__main__":
    sys.exit(main())
