"""Which policies are compared: schemes from the registry, at budgets, always beside dense."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from foveate.sparse_attn import registry
from foveate.sparse_attn.errors import SchemeConfigError, SchemeError
from foveate.sparse_attn.protocol import Scheme

DENSE = "dense"
BUDGET = "budget_tokens"
TAIL = "dense_tail_tokens"


@dataclass(frozen=True, slots=True, eq=False)
class Policy:
    """A scheme with options, as a request would give it.

    Attributes:
        attention: ``{"scheme": name, option: value, ...}``.
        scheme: Built for the model.
    """

    attention: Mapping[str, Any]
    scheme: Scheme

    @property
    def label(self) -> str:
        return label(self.attention)

    @property
    def digest(self) -> str:
        """Equal iff the same keys are read: scheme, all its options, and its profile."""
        return hashlib.sha256(self.scheme.identity.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Refused:
    """A policy that cannot be run here, and why."""

    attention: Mapping[str, Any]
    reason: str


def label(attention: Mapping[str, Any]) -> str:
    """``name``, ``name 512`` with a budget, and other options that were given behind it."""
    words = [str(attention["scheme"])]
    if BUDGET in attention:
        words.append(str(attention[BUDGET]))
    words += [
        f"{name}={json.dumps(value)}" for name, value in sorted(attention.items()) if name not in ("scheme", BUDGET)
    ]
    return " ".join(words)


def labels_of(policies: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, str]:
    """By digest, the label of each policy.

    Those that share one, with another profile or other defaults, get the beginning of their digest behind it.

    Args:
        policies: Digest and policy; may repeat.
    """
    labels = {digest: label(attention) for digest, attention in policies}
    shared = Counter(labels.values())
    return {digest: f"{name} [{digest[:6]}]" if shared[name] > 1 else name for digest, name in labels.items()}


def choices(
    names: Sequence[str], options: Mapping[str, Any], policies: Iterable[Mapping[str, Any]], budgets: Sequence[int]
) -> list[dict[str, Any]]:
    """What is to be run: dense, then each scheme at each budget.

    Args:
        names: Schemes; each is given those of ``options`` that it has.
        options: By name.
        policies: Whole policies.
        budgets: Tried wherever a scheme has ``budget_tokens`` and none is given.

    Raises:
        UnknownScheme: a name is not registered; the message lists those that are.
        SchemeConfigError: no named scheme has one of ``options``.
    """
    # The dense tail would read the question whole, and a scheme with dense answers then finds whatever dense finds.
    wanted = [
        {"scheme": name, **_without_tail(name), **given}
        for name, given in ((policy.pop("scheme"), policy) for policy in named(names, options))
        if name != DENSE
    ]
    found: list[dict[str, Any]] = [{"scheme": DENSE}]
    for attention in [*wanted, *map(dict, policies)]:
        has = {item.name for item in fields(registry.load(attention["scheme"]).Options)}
        variants = [attention]
        if BUDGET in has and BUDGET not in attention:
            variants = [{**attention, BUDGET: budget} for budget in budgets] or [attention]
        found += [variant for variant in variants if variant not in found]
    return found


def named(names: Sequence[str], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A policy for each of ``names``, with those of ``options`` that the scheme has.

    Raises:
        UnknownScheme: a name is not registered; the message lists those that are.
        SchemeConfigError: no named scheme has one of ``options``.
    """
    known = {name: {item.name for item in fields(registry.load(name).Options)} for name in names}
    for option in options:
        if not any(option in has for has in known.values()):
            raise SchemeConfigError(f"none of the schemes chosen has an option {option!r}")
    return [{"scheme": name, **{k: v for k, v in options.items() if k in known[name]}} for name in names]


def _without_tail(name: str) -> dict[str, Any]:
    """Switches a scheme's dense tail off, where it has one by default."""
    tail = next(item for item in fields(registry.load(name).Options) if item.name == TAIL)
    return {TAIL: 0} if tail.default else {}


def build(
    attentions: Iterable[dict[str, Any]], make: Callable[[dict[str, Any]], Scheme]
) -> tuple[list[Policy], list[Refused]]:
    """Builds each policy with ``make``; one that cannot be had here, such as for want of a profile, is put aside."""
    made: list[Policy] = []
    refused: list[Refused] = []
    for attention in attentions:
        try:
            made.append(Policy(attention, make(attention)))
        except SchemeError as error:
            refused.append(Refused(attention, str(error)))
    return made, refused
