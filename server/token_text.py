"""The text and bytes of single tokens, for log-probabilities."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CACHED_TOKENS = 16_384


def byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters, used by every byte-level BPE."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = byte_alphabet()


class TokenText:
    """Looks up what one token stands for.

    A lone token may be part of a character: its text then holds U+FFFD, its bytes are exact.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Some tokenizers drop the space before the first token of a text, so a token is read behind another.
        self._anchor: list[int] = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._anchor_text: str = tokenizer.decode(self._anchor)
        self._special = frozenset(tokenizer.all_special_ids)
        self.of = lru_cache(_CACHED_TOKENS)(self._of)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def _of(self, token_id: int) -> tuple[str, list[int]]:
        decoded: str = self._tokenizer.decode([*self._anchor, token_id], skip_special_tokens=False)
        text = decoded.removeprefix(self._anchor_text)
        if "\ufffd" not in text:
            return text, list(text.encode())
        spelled: str = self._tokenizer.convert_ids_to_tokens(token_id) or ""
        if match := _BYTE_TOKEN.fullmatch(spelled):
            return text, [int(match[1], 16)]
        if all(char in _BYTES for char in spelled):
            return text, [_BYTES[char] for char in spelled]
        return text, list(text.encode())
