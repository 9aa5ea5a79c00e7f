"""Real text for the tasks that read it: a given file, or the manual that comes with Python."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Text:
    """
    Attributes:
        name: Where it comes from.
        digest: SHA-256 of it, since Python's manual differs by version.
        ids: Its tokens.
        prefix: What the model expects before every text.
    """

    name: str
    digest: str
    ids: list[int]
    prefix: list[int]

    def piece(self, rng: random.Random, tokens: int) -> list[int]:
        """A piece of ``tokens`` tokens from anywhere, the prefix included.

        Raises:
            ValueError: the text is too short.
        """
        length = tokens - len(self.prefix)
        if len(self.ids) < length:
            raise ValueError(f"{self.name} has {len(self.ids)} tokens, {length} are needed: give a longer --text")
        start = rng.randint(0, len(self.ids) - length)
        return self.prefix + self.ids[start : start + length]


def read_text(path: Path | None, tokenizer: Any) -> Text:
    """Reads and tokenises ``path``, or Python's reference manual (about 110,000 tokens of prose and code).

    Profiles are learnt from another text, so nothing is tested on what it was calibrated with.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8.
    """
    if path is None:
        from pydoc_data.topics import topics

        name, text = "Python's reference manual", "\n\n".join(topics[topic] for topic in sorted(topics))
    else:
        name, text = path.name, path.read_text(encoding="utf-8")
    # `verbose` would warn that a whole book is longer than the model's context.
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    prefix = tokenizer("", add_special_tokens=True).input_ids
    return Text(name, hashlib.sha256(text.encode("utf-8")).hexdigest(), ids, prefix)
