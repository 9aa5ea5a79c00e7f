"""From token ids to text, a token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .request import SamplingParams

_REPLACEMENT = "\ufffd"
# An unfinished UTF-8 character has at most 3 bytes, and a decoder writes at most one U+FFFD for each.
_MAX_HELD = 3
# The held characters stand for at most 9 bytes, and UTF-8 falls into step within 3. A token has at least one byte.
_TOKENS_KEPT = 16
_MAX_TOKENS_PENDING = 24


class TextTokenizer(Protocol):
    """What is used of a ``transformers`` fast tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str: ...


class Detokenizer:
    """Turns generated ids into text without ever taking a character back.

    The texts that ``push`` and ``flush`` give make up ``tokenizer.decode`` of all generated ids, and follow the
    prompt's text as they would if prompt and answer were decoded together. A U+FFFD comes out once nothing can
    turn it into a character any more. What was emitted is forgotten, so the cost of a token is bounded.

    Two cases differ on purpose. If the prompt ends within a character, the answer's text is that of its own ids.
    And a tokenizer with byte fallback (Llama 2) blanks a whole run of byte tokens for one bad byte: characters
    of the run that were complete stay as they were sent.

    Args:
        tokenizer: A byte-level or sentencepiece-like tokenizer.
        prompt_token_ids: Tells whether the answer begins the text.
        params: ``skip_special_tokens`` and ``visible_ids`` are read.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = params.skip_special_tokens
        self._visible = frozenset(params.visible_ids if params.skip_special_tokens else ())
        # Sentencepiece drops the space that begins a text, so text is read behind a letter. A letter is a better
        # context than the last tokens: it is never a part of a character.
        self._anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._anchor_length = len(self._decode(self._anchor))
        self._begins_text = self._is_silent(prompt_token_ids)
        self._pending: list[int] = []
        self._text = ""  # of the pending tokens
        self._shown = 0  # characters of it that are out

    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before; often empty within a character."""
        if token_id in self._visible:
            rest, self._begins_text = self.flush(), False
            return rest + self._tokenizer.decode(
                [token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        self._pending.append(token_id)
        text = self._pending_text()
        if text == self._text and self._is_silent((token_id,)):
            self._pending.pop()
            return ""
        self._text = text
        held = min(len(text) - len(text.rstrip(_REPLACEMENT)), _MAX_HELD)
        if not held:
            return self.flush()
        end = max(self._shown, len(text) - held)
        new, self._shown = text[self._shown : end], end
        return new + self._trim() if len(self._pending) > _MAX_TOKENS_PENDING else new

    def flush(self) -> str:
        """What was held back. To be called when generation ends."""
        rest = self._text[self._shown :]
        if self._pending:
            self._begins_text = False
        self._pending, self._text, self._shown = [], "", 0
        return rest

    def _trim(self) -> str:
        """Forgets the oldest pending tokens; gives up the held text in the rare case that it depends on them."""
        held = self._text[self._shown :]
        kept = self._pending[-_TOKENS_KEPT:]
        self._begins_text = False
        self._pending = kept
        text = self._pending_text()
        if not text.endswith(held):
            return self.flush()
        self._text, self._shown = text, len(text) - len(held)
        return ""

    def _pending_text(self) -> str:
        if self._begins_text:
            return self._decode(self._pending)
        return self._decode([*self._anchor, *self._pending])[self._anchor_length :]

    def _is_silent(self, token_ids: Sequence[int]) -> bool:
        """Whether these tokens have no text anywhere: special tokens that are left out, ids without a token.

        A lone space may be dropped at the beginning of a text, but two are not.
        """
        tried = set()
        for token_id in reversed(token_ids):
            if token_id not in tried:
                if self._decode([token_id, token_id]):
                    return False
                tried.add(token_id)
        return True

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(
            token_ids, skip_special_tokens=self._skip_special_tokens, clean_up_tokenization_spaces=False
        )
