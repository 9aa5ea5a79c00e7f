"""Composed: the prompt as one scheme reads it, the answer as another does."""

from __future__ import annotations

import json

import pytest
import torch

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.stats import KEY_MAX, KEY_MIN
from foveate.sparse_attn import registry
from foveate.sparse_attn.errors import CalibrationMissing, SchemeConfigError, UnknownScheme
from foveate.sparse_attn.protocol import Phase

from .test_schemes import World, close

PROMPT = {"scheme": "xattention", "block_tokens": 16, "stride_tokens": 4, "tau": 0.4}
ANSWER = {"scheme": "quest", "budget_tokens": 16, "min_pages": 1, "dense_first_layers": 0}
BARE = {"sink_tokens": 0, "window_tokens": 0}


def built(part):
    options = dict(part)
    return registry.build(options.pop("scheme"), **options)


def test_each_phase_is_that_schemes():
    prompt, answer = PROMPT | BARE, ANSWER | BARE
    scheme = registry.build("composed", prefill=prompt, decode=answer)
    for layer in (0, 1):
        world, by_hand = World([150], scheme), World([150], scheme)
        close(world.run([(0, 149)], layer=layer)[0][0], World([150], built(prompt)).run([(0, 149)], layer=layer)[0][0])
        got, step = world.run([(149, 150)], phase=Phase.DECODE, layer=layer)
        by_hand.run([(0, 149)], layer=layer)
        by_hand.scheme = built(answer)
        want, alone = by_hand.run([(149, 150)], phase=Phase.DECODE, layer=layer)
        close(got[0], want[0])
        assert torch.equal(step.keys_read, alone.keys_read)
        assert step.keys_read[0, 0] < 0.5 * step.keys_read[0, 1]


def test_a_phase_that_a_part_reads_whole_is_read_whole():
    scheme = registry.build("composed", prefill="quest", decode="xattention")
    assert [scheme.for_phase(phase).name for phase in Phase] == ["dense", "dense"]
    assert scheme.for_phase(Phase.PREFILL) is scheme.for_phase(Phase.PREFILL)


def test_names_alone_take_the_defaults():
    scheme = registry.build("composed")
    assert scheme.for_phase(Phase.PREFILL).options == registry.load("xattention").Options()
    assert scheme.for_phase(Phase.DECODE).options == registry.load("quest").Options()
    same = registry.build("composed", prefill={"scheme": "xattention"}, decode="quest")
    assert same.identity == scheme.identity
    assert registry.build("composed", decode="dense").identity != scheme.identity


def test_pages_keep_what_either_part_needs_once():
    geometry = CacheGeometry(2, 2, 16, 16, 4)
    both = registry.build("composed", prefill={"scheme": "quest", "sparse_prefill": True}, decode="quest")
    assert both.page_stats(geometry) == (KEY_MIN, KEY_MAX)
    assert registry.build("composed", decode="dense").page_stats(geometry) == ()


def test_it_goes_through_json():
    options = {"prefill": PROMPT, "decode": "quest"}
    scheme = registry.build("composed", **json.loads(json.dumps(options)))
    assert scheme.identity == registry.build("composed", **options).identity
    (entry,) = [entry for entry in registry.describe() if entry["name"] == "composed"]
    assert (entry["options"]["prefill"], entry["options"]["decode"]) == ("xattention", "quest")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"prefill": "nosuch"}, UnknownScheme, "^prefill: .*'nosuch'.*quest"),
        ({"decode": {"scheme": "nosuch"}}, UnknownScheme, "^decode: .*'nosuch'"),
        ({"decode": {"scheme": "quest", "nosuch": 1}}, SchemeConfigError, "^decode: .*nosuch.*min_pages"),
        ({"prefill": {"scheme": "xattention", "tau": 7}}, SchemeConfigError, "^prefill: tau"),
        ({"prefill": {"tau": 0.5}}, SchemeConfigError, "^prefill must be"),
        ({"prefill": {"scheme": ["quest"]}}, SchemeConfigError, "^prefill must be"),
        ({"decode": 5}, SchemeConfigError, "^decode must be"),
        ({"decode": None}, SchemeConfigError, "^decode must be"),
        ({"decode": "composed"}, SchemeConfigError, "^decode: composed"),
        ({"prefill": {"scheme": "composed", "decode": "quest"}}, SchemeConfigError, "^prefill: composed"),
        ({"window_tokens": 64}, SchemeConfigError, "to its parts"),
        ({"budget_tokens": 64}, SchemeConfigError, "decode, dense_tail_tokens, prefill"),
        ({"decode": {"scheme": "quest", "name": "x"}}, SchemeConfigError, "^decode: unknown option name"),
    ],
    ids=str,
)
def test_errors_name_the_part(options, error, said):
    with pytest.raises(error, match=said):
        registry.build("composed", **options)


def test_a_part_that_needs_a_profile_says_how_to_make_it():
    with pytest.raises(CalibrationMissing, match="foveate calibrate MODEL --scheme kascade"):
        registry.build("composed", prefill="kascade")
