"""llama.cpp's notation for grammars (GBNF) in Lark's, so that the same texts are derived.

llguidance reads it (``llguidance.gbnf_to_lark``), but writes rules as terminals of a lexer wherever it can, and a lexer
takes the longest: ``num num`` with ``num ::= [0-9]+`` never came to its second number, and llama.cpp's own
``arithmetic.gbnf`` never to its end. Here every rule stays a rule, and a lexeme is one character, so that none is
longer than another.
"""

from __future__ import annotations

import json
import re
from typing import Any

from llguidance.gbnf_to_lark import (
    GrammarParser,
    LiteralNode,
    Position,
    RegexNode,
    SequenceNode,
    is_lark_syntax,
    resolve,
)

_ESCAPED = re.compile(r"\\u\{([0-9a-f]+)\}|\\(.)|(.)", re.DOTALL)
_NAMED = {"n": "\n", "r": "\r", "t": "\t"}


class _Parser(GrammarParser):
    def _parse_char(self, pos: Position) -> tuple[str, Position]:
        r"""The next character, an escaped one as ``\u{...}``: the library would drop leading zeros."""
        text, after = super()._parse_char(pos)
        if not text.startswith("\\"):
            return text, after
        escape = pos.text[pos.pos + 1 : after.pos]
        char = chr(int(escape[1:], 16)) if escape[0] in "xuU" else _NAMED.get(escape, escape)
        return rf"\u{{{ord(char):x}}}", after


def is_gbnf(text: str) -> bool:
    """Whether a grammar is in this notation, and not in Lark's."""
    return not is_lark_syntax(text)


def lark_of(text: str) -> str:
    """A grammar in Lark's notation that derives the texts of ``text``, one in GBNF.

    Raises:
        ValueError: it is wrong.
    """
    try:
        rules = _Parser().parse(text)
        resolve(rules)
    except Exception as error:
        raise ValueError(f"it cannot be read: {error}") from None
    taken: set[str] = set()
    for rule in rules.values():
        name = rule.name.lower()  # names in capitals are terminals
        rule.name = name if name not in taken else f"{name}_{rule.order}"
        taken.add(rule.name)
        rule.comment = ""
        rule.alternatives = _by_characters(rule.alternatives)
    return "%llguidance {}\n" + "\n".join(str(rule) for rule in sorted(rules.values(), key=lambda rule: rule.order))


def _by_characters(node: Any) -> Any:
    """``node`` with literals of one character each, and classes and ``.`` as GBNF means them."""
    if isinstance(node, LiteralNode):
        return SequenceNode(
            [LiteralNode(json.dumps(char, ensure_ascii=False)[1:-1]) for char in _characters(node.value)]
        )
    if isinstance(node, RegexNode):
        return RegexNode("(?s:.)" if node.rx == "." else _class(node.rx))
    for name, value in vars(node).items():
        if name in ("node", "nodes", "alternatives"):
            inner = [_by_characters(item) for item in value] if isinstance(value, list) else _by_characters(value)
            setattr(node, name, inner)
    return node


def _characters(text: str) -> list[str]:
    return [chr(int(code, 16)) if code else escaped or plain for code, escaped, plain in _ESCAPED.findall(text)]


def _class(text: str) -> str:
    """A class of characters for Rust's regular expressions, which know operators between sets too."""
    negated = text.startswith("[^")
    left = _characters(text[2 if negated else 1 : -1])
    parts: list[str] = []
    while left:
        first = left.pop(0)
        if len(left) > 1 and left[0] == "-":
            parts.append(f"{_written(first)}-{_written(left[1])}")
            del left[:2]
        else:
            parts.append(_written(first))
    return f"[{'^' if negated else ''}{''.join(parts)}]"


def _written(char: str) -> str:
    r"""A character for a class: letters and digits as they are, all others by number."""
    return char if char.isascii() and char.isalnum() else rf"\u{{{ord(char):x}}}"
