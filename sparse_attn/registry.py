"""Every scheme that exists: one line each. Loaded when chosen, so a broken scheme breaks only itself.

The command line reads the names for its help, so this module loads torch only where a scheme is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import UnknownScheme

if TYPE_CHECKING:
    from .profile import Profile
    from .protocol import Scheme

_SCHEMES = {
    "dense": "foveate.sparse_attn.schemes.dense:Dense",
    "streaming": "foveate.sparse_attn.schemes.streaming:Streaming",
    "exact_topk": "foveate.sparse_attn.schemes.exact_topk:ExactTopk",
    "kascade": "foveate.sparse_attn.schemes.kascade:Kascade",
    "moba": "foveate.sparse_attn.schemes.moba:Moba",
    "dhsa": "foveate.sparse_attn.schemes.dhsa:Dhsa",
    "dhsa_block": "foveate.sparse_attn.schemes.dhsa_block:DhsaBlock",
    "top_theta": "foveate.sparse_attn.schemes.top_theta:TopTheta",
    "quest": "foveate.sparse_attn.schemes.quest:Quest",
    "xattention": "foveate.sparse_attn.schemes.xattention:XAttention",
    "composed": "foveate.sparse_attn.schemes.composed:Composed",
}


def names() -> tuple[str, ...]:
    """Names of all schemes, in order of registration."""
    return tuple(_SCHEMES)


def load(name: str) -> type[Scheme]:
    """The class of a scheme.

    Raises:
        UnknownScheme: the message lists the schemes that exist.
    """
    if name not in _SCHEMES:
        raise UnknownScheme(f"unknown attention scheme {name!r}; there are: {', '.join(_SCHEMES)}")
    module, _, attribute = _SCHEMES[name].partition(":")
    scheme: type[Scheme] = getattr(import_module(module), attribute)
    return scheme


def build(name: str, profiles: Mapping[str, Profile] | None = None, /, **options: Any) -> Scheme:
    """Makes a scheme from its name and options.

    Args:
        name: As registered.
        profiles: Profiles of the model, by scheme.
        options: The scheme's options.

    Raises:
        UnknownScheme: no scheme of that name.
        SchemeConfigError: an option is unknown or out of range.
        CalibrationMissing: the scheme needs a profile.
    """
    from .protocol import options_from

    scheme = load(name)
    return scheme(options_from(scheme.Options, options), profiles)


def check(name: str, /, **options: Any) -> None:
    """Whether a scheme takes ``options``, without building it.

    Raises:
        UnknownScheme: no scheme of that name.
        SchemeConfigError: an option is unknown or out of range.
    """
    from .protocol import options_from

    options_from(load(name).Options, options)


def describe() -> list[dict[str, Any]]:
    """Name, source and options with defaults of every scheme, ready for JSON."""
    described = []
    for name in names():
        scheme = load(name)
        options = {item.name: None if item.default is MISSING else item.default for item in fields(scheme.Options)}
        described.append({"name": name, "source": scheme.source, "calibrated": scheme.calibrated, "options": options})
    return described
