"""The books of a step, without an engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from foveate.server.output import Outbox


def chunk_of(count, generated=3):
    group = SimpleNamespace(
        request=SimpleNamespace(prompt_token_ids=[1] * 5, scheme=SimpleNamespace(name="streaming")),
        keys_read=0.0, keys_dense=0.0, mass_kept=0.0, audited_tokens=0, cached_tokens=0,
    )  # fmt: skip
    return SimpleNamespace(
        sequence=SimpleNamespace(group=group, num_generated=generated), count=count, ends_sequence=True
    )


@pytest.mark.parametrize(
    ("count", "mass", "audited"),
    [(1, 0.5, 1), (1, None, 0), (1, float("nan"), 0), (1, float("inf"), 0), (7, 0.5, 0)],
    ids=["decode", "no-audit", "nan", "inf", "read-again"],
)
def test_mass_is_booked_once_and_only_if_it_is_a_number(count, mass, audited):
    outbox, chunk = Outbox(), chunk_of(count)
    outbox.count_step([chunk], [(2.0, 4.0)], [mass])
    group = chunk.sequence.group
    assert (group.audited_tokens, group.mass_kept) == (audited, 0.5 * audited)
    assert {name: sum(found.counts) for name, found in outbox.mass_kept.items()} == (
        {"streaming": 1} if audited else {}
    )
    assert (group.keys_read, group.keys_dense, outbox.keys_read, outbox.keys_dense) == (2.0, 4.0, 2.0, 4.0)
