"""Profiles: two that differ in anything have other digests, and a file tells when it was changed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from foveate.sparse_attn.errors import ProfileError
from foveate.sparse_attn.profile import FORMAT, Profile

PROFILE = Profile("top_theta", {"num_layers": 2}, {"lengths": [64]}, "ab", {"theta": torch.arange(4.0)})


@pytest.mark.parametrize(
    "change",
    [
        {"scheme": "kascade"},
        {"model": {"num_layers": 3}},
        {"options": {"lengths": [128]}},
        {"data_hash": "cd"},
        {"tensors": {"other": torch.arange(4.0)}},
        {"tensors": {"theta": torch.tensor([0.0, 1.0, 2.0, 3.5])}},
        {"tensors": {"theta": torch.arange(4.0), "more": torch.zeros(1)}},
    ],
    ids=["scheme", "model", "options", "data", "tensor-name", "tensor-value", "tensor-more"],
)
def test_each_part_is_in_the_digest(change):
    """A scheme's identity holds it, by which pages in the cache are told apart."""
    assert replace(PROFILE, **change).digest != PROFILE.digest
    assert replace(PROFILE).digest == PROFILE.digest


def test_the_order_in_which_options_were_given_is_not():
    pairs = {"lengths": [64], "budgets": [8]}
    turned = dict(reversed(pairs.items()))
    assert replace(PROFILE, options=pairs, model=turned).digest == replace(PROFILE, options=turned, model=pairs).digest


def test_a_file_gives_back_all_of_it(tmp_path):
    PROFILE.save(tmp_path / "profile")
    found = Profile.load(tmp_path / "profile")
    for name in ("scheme", "model", "options", "data_hash", "digest"):
        assert getattr(found, name) == getattr(PROFILE, name)
    assert torch.equal(found.tensors["theta"], PROFILE.tensors["theta"])
    assert [path.name for path in tmp_path.iterdir()] == ["profile"]


@pytest.mark.parametrize("name", ["scheme", "model", "options", "data_hash", "tensors", "digest"])
def test_a_file_that_was_changed_is_refused(tmp_path, name):
    PROFILE.save(tmp_path / "profile")
    with safe_open(tmp_path / "profile", framework="pt") as file:
        about = file.metadata()
    header, tensors = json.loads(about[FORMAT]), {"theta": PROFILE.tensors["theta"].clone()}
    if name == "tensors":
        tensors["theta"][2] += 1
    elif name == "digest":
        del about["digest"]
    else:
        header[name] = {"num_layers": 9} if name in ("model", "options") else "kascade"
    save_file(tensors, tmp_path / "changed", metadata={**about, FORMAT: json.dumps(header)})
    with pytest.raises(ProfileError, match="is damaged"):
        Profile.load(tmp_path / "changed")
