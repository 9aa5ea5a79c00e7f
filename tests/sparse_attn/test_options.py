"""Whatever a client gives as an option is refused when the scheme is built, or a step survives it."""

from __future__ import annotations

from dataclasses import dataclass, fields, make_dataclass

import pytest

from foveate.sparse_attn import registry
from foveate.sparse_attn.errors import SchemeConfigError
from foveate.sparse_attn.protocol import LARGEST_COUNT, LARGEST_NUMBER, Phase, check_kinds

from .cases import PROFILES, tight
from .test_schemes import World

VALUES = {
    "10**20": 10**20,
    "2**62": 2**62,
    "2**63": 2**63,
    "10**400": 10**400,  # JSON may hold it, and no float does
    "-1": -1,
    "nan": float("nan"),
    "inf": float("inf"),
    "1e308": 1e308,
    "true": True,
    "largest count": LARGEST_COUNT,
    "largest number": LARGEST_NUMBER,
}

# What must be chosen for each option to act somewhere, beside ``tight``.
VARIANTS: dict[str, list[dict[str, object]]] = {
    "moba": [{"sparse_decode": True}],
    "exact_topk": [{}, {"budget_tokens": 0}],
    "kascade": [{}, {"budget_tokens": 0}],
    "dhsa": [{}, {"boundaries": "attn_ratio"}, {"boundaries": "key_cos"}],
    "dhsa_block": [{"sparse_decode": True}]
    + [{"budget_tokens": 0, "variant": variant, "sparse_decode": True} for variant in ("topk", "vs", "vsb")],
    "top_theta": [{"compensation": compensation} for compensation in ("exact", "bound", "calibrated")],
}


def runs(scheme):
    """A prompt and a generated token of two sequences, in both layers."""
    world = World([90, 40], scheme)
    for phase, spans in ((Phase.PREFILL, [(0, 89), (0, 39)]), (Phase.DECODE, [(89, 90), (39, 40)])):
        for out in world.run(spans, phase, layer=1)[0]:
            assert bool(out.isfinite().all())


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(
    ("name", "option"), [(name, item.name) for name in registry.names() for item in fields(registry.load(name).Options)]
)
def test_an_option_is_refused_or_a_step_survives_it(name, option, value):
    for variant in VARIANTS.get(name, [{}]):
        options = tight(name) | variant | {option: VALUES[value]}
        parts = [] if name == "composed" else [{phase.value: {"scheme": name, **options}} for phase in Phase]
        try:
            scheme = registry.build(name, PROFILES, **options)
        except SchemeConfigError:
            for part in parts:
                with pytest.raises(SchemeConfigError, match=f"^{next(iter(part))}: "):
                    registry.build("composed", PROFILES, **part)
            continue
        runs(scheme)
        for part in parts:
            runs(registry.build("composed", PROFILES, **part))


@dataclass(frozen=True)
class Named:
    count: int = 0
    number: float = 0.0
    switch: bool = False
    word: str = ""


# Annotations are text here, and types where a file does without ``from __future__ import annotations``.
Typed = make_dataclass("Typed", [("count", int, 0), ("number", float, 0.0), ("switch", bool, False), ("word", str, "")])


@pytest.mark.parametrize("kind", [Named, Typed])
@pytest.mark.parametrize(
    ("option", "value"),
    [("count", value) for value in (-1, LARGEST_COUNT + 1, 10**400, 1.0, float("nan"), True, "1", None)]
    + [("number", value) for value in (float("nan"), float("inf"), -1e39, 10**400, True, "1", None)]
    + [("switch", value) for value in (0, 1.0, "true", None)],
    ids=lambda value: repr(value)[:20],
)
def test_what_an_option_cannot_be_is_named(kind, option, value):
    with pytest.raises(SchemeConfigError, match=option):
        check_kinds(kind(**{option: value}))


@pytest.mark.parametrize("kind", [Named, Typed])
def test_what_an_option_can_be_is_let_through(kind):
    check_kinds(kind(count=LARGEST_COUNT, number=LARGEST_NUMBER, switch=True, word=5))
    whole = kind(number=-(10**38))
    check_kinds(whole)
    assert repr(whole.number) == "-1e+38"
