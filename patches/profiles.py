"""Finds the calibration profiles of a model: those it was given, and those that come with the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from foveate.sparse_attn import registry
from foveate.sparse_attn.errors import ProfileError
from foveate.sparse_attn.profile import Profile


def profiles_for(fingerprint: Mapping[str, Any], paths: str | Path | Sequence[str | Path]) -> Mapping[str, Profile]:
    """Profiles by scheme; a given file wins over one that comes with the package.

    Args:
        fingerprint: The model's, see ``fingerprint.py``.
        paths: File or files of profiles.

    Raises:
        ProfileError: a given file cannot be read, was made for another model, is for a scheme that
            does not exist, or is the second one for its scheme.
    """
    found = {profile.scheme: profile for profile in map(Profile.load, shipped()) if profile.model == fingerprint}
    given = read_profiles(paths)
    for profile in given.values():
        profile.check_model(fingerprint)
    return {**found, **given}


def read_profiles(paths: str | Path | Sequence[str | Path]) -> dict[str, Profile]:
    """Given profiles by scheme, of whatever model.

    Args:
        paths: File or files of profiles.

    Raises:
        ProfileError: a file cannot be read, is for a scheme that does not exist, or is the second one for its scheme.
    """
    given: dict[str, Profile] = {}
    for path in (paths,) if isinstance(paths, str | Path) else paths:
        profile = Profile.load(path)
        if profile.scheme not in registry.names():
            raise ProfileError(f"{path} is a profile for {profile.scheme!r}, which is not a scheme")
        if profile.scheme in given:
            raise ProfileError(f"{path} is a second profile for {profile.scheme}")
        given[profile.scheme] = profile
    return given


def shipped() -> list[Path]:
    """Profiles that come with the package."""
    folder = Path(str(resources.files("foveate.patches"))) / "data"
    return sorted(folder.glob("*.safetensors"))
