"""A profile: what calibration learnt of one model for one scheme, in one self-describing file.

The file is safetensors: named tensors, and a JSON header that says what they are for. No code is
run to read it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import ProfileError

FORMAT = "foveate-profile"
VERSION = 1


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """
    Attributes:
        scheme: The scheme that reads it.
        model: Fingerprint of the model, as ``patches.fingerprint`` makes it.
        options: What calibration was told: lengths, budgets, anchors and the like.
        data_hash: SHA-256 of the token ids it was made from.
        tensors: What was learnt, by name.
        digest: SHA-256 of all of it.
    """

    scheme: str
    model: Mapping[str, Any]
    options: Mapping[str, Any]
    data_hash: str
    tensors: Mapping[str, torch.Tensor]
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        found = hashlib.sha256(self._header().encode())
        for name in sorted(self.tensors):
            found.update(name.encode())
            found.update(self.tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
        object.__setattr__(self, "digest", found.hexdigest())

    def _header(self) -> str:
        about = {"scheme": self.scheme, "model": dict(self.model), "options": dict(self.options)}
        return json.dumps({"version": VERSION, **about, "data_hash": self.data_hash}, sort_keys=True)

    def save(self, path: str | Path) -> None:
        """Writes the file whole, or not at all.

        Raises:
            OSError: it cannot be written.
        """
        target = Path(path)
        part = target.with_name(f".{target.name}.part")
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        try:
            save_file(tensors, part, metadata={FORMAT: self._header(), "digest": self.digest})
        except SafetensorError as error:  # a full disk among others
            raise OSError(f"{target} cannot be written: {error}") from error
        else:
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Reads a file.

        Raises:
            ProfileError: it cannot be read, is not a profile, is of another version, or is damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        except (OSError, SafetensorError) as error:
            raise ProfileError(f"{path} cannot be read as a profile: {error}") from error
        if FORMAT not in about:
            raise ProfileError(f"{path} is a safetensors file, but not a profile")
        header = json.loads(about[FORMAT])
        if header["version"] != VERSION:
            raise ProfileError(f"{path} is a profile of version {header['version']}, this program reads {VERSION}")
        profile = cls(header["scheme"], header["model"], header["options"], header["data_hash"], tensors)
        if profile.digest != about.get("digest"):
            raise ProfileError(f"{path} is damaged: its contents do not match its digest")
        return profile

    def check_model(self, fingerprint: Mapping[str, Any]) -> None:
        """
        Raises:
            ProfileError: the profile was made for another model; the message names what differs.
        """
        names = sorted({*self.model, *fingerprint})
        differing = [name for name in names if self.model.get(name) != fingerprint.get(name)]
        if differing:
            told = ", ".join(f"{n} {self.model.get(n)!r}, here {fingerprint.get(n)!r}" for n in differing)
            raise ProfileError(f"the profile for {self.scheme} was made for another model: {told}")
