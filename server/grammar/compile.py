"""Calls of llguidance (https://github.com/guidance-ai/llguidance): tokenizer, grammar text, matcher, limits.

Its matchers compute masks as they go, so a grammar costs little to build, and what one step may cost is bounded by
these limits. Building itself is not bounded everywhere: see ``trial``, which this file shares with the server. It
imports nothing heavy.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import llguidance

from ..token_text import byte_alphabet
from .gbnf import is_gbnf, lark_of
from .schema import for_library
from .source import Kind

# One mask may cost about 10 ms of the step loop at most: the library's own figures are 14 lexer steps and 20 items
# per microsecond. A JSON schema of a page takes a twentieth of it.
_LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    step_max_items=25_000,
    max_items_in_row=10_000,  # an object of 2,200 optional properties has 8,807
    max_lexer_states=20_000,  # 1 to 2 kB each, per answer
    max_grammar_size=200_000,
    verbose_errors=False,
)
_MAX_REASON_CHARS = 300


def tokenizer_of(text: str, vocab_size: int, eos_token_id: int) -> llguidance.LLTokenizer:
    """The tokenizer as llguidance reads it.

    Args:
        text: Content of its ``tokenizer.json``.
        vocab_size: At least as many as the tokenizer knows.
        eos_token_id: A token that no text holds.

    Raises:
        ValueError: of a kind that it does not know.
    """
    return llguidance.LLTokenizer(text, n_vocab=vocab_size, eos_token=eos_token_id)


def miniature(special: Sequence[str]) -> dict[str, Any]:
    """Arguments of ``tokenizer_of`` for a tokenizer of single bytes, which is read in no time.

    Args:
        special: Tokens that a grammar may name; they come behind the 256 bytes, in this order.
    """
    tokens = {content: 256 + place for place, content in enumerate(special)}
    tokens["<|foveate:end|>"] = 256 + len(special)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    text = {
        "version": "1.0",
        "added_tokens": [{"id": id_, "content": content, **flags} for content, id_ in tokens.items()],
        "pre_tokenizer": levels,
        "decoder": levels,
        "model": {"type": "BPE", "vocab": {**byte_alphabet(), **tokens}, "merges": []},
    }
    return {"text": json.dumps(text), "vocab_size": 257 + len(special), "eos_token_id": 256 + len(special)}


def normal_form(kind: Kind, text: str) -> str:
    """A grammar in llguidance's own notation.

    Raises:
        ValueError: a part of it cannot be read.
    """
    matcher = llguidance.LLMatcher
    if kind == "json":
        return matcher.grammar_from_json_schema(for_library(json.loads(text), lenient=False))
    if kind == "regex":
        return matcher.grammar_from_regex(ascii_digits(text))
    if kind == "choice":
        options = dict.fromkeys(json.loads(text))
        return matcher.grammar_from_lark("start: " + " | ".join(json.dumps(item) for item in options))
    if kind == "grammar":
        return matcher.grammar_from_lark(lark_of(text) if is_gbnf(text) else text)
    return matcher.grammar_from_lark(text)


def ascii_digits(pattern: str) -> str:
    r"""``pattern`` with ``[0-9]`` for ``\d``, but in negated classes.

    To the library ``\d`` is any digit of any script, and of a newer Unicode than the reader of the answer may know.
    What the narrower class matches, every regex engine's ``\d`` does.
    """
    written, negated = [], [False]  # one entry per open class, behind one for the outside
    place = 0
    while place < len(pattern):
        char = pattern[place]
        if char == "\\":
            pair = pattern[place : place + 2]
            digits = "0-9" if len(negated) > 1 else "[0-9]"
            written.append(digits if pair == "\\d" and not any(negated) else pair)
            place += 2
            continue
        written.append(char)
        place += 1
        if char == "[" and not pattern.startswith("[:", place - 1):
            negated.append(pattern.startswith("^", place))
        elif char == "]" and len(negated) > 1 and pattern[place - 2 : place] not in ("[]", ":]"):
            negated.pop()
    return "".join(written)


def matcher_of(tokenizer: llguidance.LLTokenizer, grammar: str) -> llguidance.LLMatcher:
    """A matcher that knows what may come first.

    Args:
        grammar: What ``normal_form`` returned.

    Raises:
        ValueError: the grammar is wrong, beyond the limits, or no text satisfies it.
    """
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)
    mask = b"" if matcher.is_error() else matcher.compute_bitmask()
    reasons = matcher.stop_reason(), matcher.get_error()  # either may say it
    if any("NoExtensionBias" in reason for reason in reasons) or not (any(mask) or matcher.is_error()):
        raise ValueError("no text satisfies it")
    if matcher.is_error():
        raise ValueError(reason_of(matcher.get_error()))
    return matcher


def reason_of(error: str) -> str:
    """An error of the library in one line of bounded length."""
    if "coerce_one_of" in error:  # an option of the library, which no request can set
        return "oneOf is supported only where its branches are clearly disjoint; use anyOf"
    words = error.partition("<state>")[0].replace("<non-verbose/>", "").split()
    return " ".join(words)[:_MAX_REASON_CHARS] or "it could not be compiled"
