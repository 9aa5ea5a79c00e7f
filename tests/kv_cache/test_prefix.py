from __future__ import annotations

import hashlib
import itertools

import pytest

from foveate.kv_cache.errors import CacheError
from foveate.kv_cache.prefix import PrefixEntry, PrefixIndex

PAGE = 4


def fill(index: PrefixIndex, tokens: list[int], first_page: int, namespace: bytes = b"") -> list[int]:
    """Inserts the full pages of ``tokens`` at ``first_page`` and up; returns the pages the index keeps."""
    parent: PrefixEntry | None = None
    kept: list[int] = []
    for number, start in enumerate(range(0, len(tokens) - PAGE + 1, PAGE)):
        parent = index.insert(parent, tokens[start : start + PAGE], namespace, first_page + number)
        assert parent is not None
        kept.append(parent.page)
    return kept


def pages(index: PrefixIndex, tokens: list[int], namespace: bytes = b"") -> list[int]:
    return [entry.page for entry in index.match(tokens, namespace)]


@pytest.mark.parametrize(
    ("length", "expected"),
    [(0, []), (3, []), (4, [10]), (7, [10]), (8, [10, 11]), (12, [10, 11, 12]), (15, [10, 11, 12])],
)
def test_only_full_pages_match(length: int, expected: list[int]) -> None:
    index = PrefixIndex(PAGE)
    tokens = list(range(15))
    fill(index, tokens, 10)
    assert pages(index, tokens[:length]) == expected


@pytest.mark.parametrize("changed", range(12))
def test_one_other_token_ends_the_match_before_its_page(changed: int) -> None:
    index = PrefixIndex(PAGE)
    tokens = list(range(12))
    fill(index, tokens, 0)
    tokens[changed] += 1
    assert pages(index, tokens) == [0, 1, 2][: changed // PAGE]


def test_the_same_page_behind_another_parent_is_another_page() -> None:
    index = PrefixIndex(PAGE)
    fill(index, [1] * 4 + [9] * 4, 0)
    fill(index, [2] * 4 + [9] * 4, 2)
    assert pages(index, [1] * 4 + [9] * 4) == [0, 1]
    assert pages(index, [2] * 4 + [9] * 4) == [2, 3]
    assert pages(index, [9] * 4) == []


def test_namespaces_do_not_mix() -> None:
    index = PrefixIndex(PAGE)
    fill(index, [1] * 8, 0, b"dense")
    fill(index, [1] * 8, 2, b"streaming")
    assert pages(index, [1] * 8, b"dense") == [0, 1]
    assert pages(index, [1] * 8, b"streaming") == [2, 3]
    assert pages(index, [1] * 8, b"other") == []


def test_keys_are_chained_sha256() -> None:
    def packed(token: int) -> bytes:
        return b"".join(token.to_bytes(8, "little") for _ in range(PAGE))

    index = PrefixIndex(PAGE)
    fill(index, [1] * 4 + [2] * 4, 0, b"salt")
    first = hashlib.sha256(hashlib.sha256(b"salt").digest() + packed(1)).digest()
    second = hashlib.sha256(first + packed(2)).digest()
    assert [entry.key for entry in index.match([1] * 4 + [2] * 4, b"salt")] == [first, second]


def test_lists_and_tuples_of_tokens_are_the_same() -> None:
    index = PrefixIndex(PAGE)
    fill(index, [1, 2, 3, 4], 0)
    assert [entry.page for entry in index.match((1, 2, 3, 4), b"")] == [0]


def test_the_first_page_of_a_key_stays() -> None:
    index = PrefixIndex(PAGE)
    fill(index, [1] * 8, 0)
    assert fill(index, [1] * 8 + [2] * 4, 5) == [0, 1, 7]
    assert len(index) == 3


def test_a_removed_page_ends_the_match_until_it_is_written_again() -> None:
    index = PrefixIndex(PAGE)
    fill(index, [1] * 4 + [2] * 4, 0)
    index.remove(1)
    assert pages(index, [1] * 4 + [2] * 4) == [0]
    assert fill(index, [1] * 4 + [2] * 4, 6) == [0, 7]


def test_children_of_a_removed_page_are_not_found() -> None:
    index = PrefixIndex(PAGE)
    fill(index, [1] * 12, 0)
    index.remove(1)
    assert pages(index, [1] * 12) == [0]
    assert index.insert(index.match([1] * 4, b"")[0], [1] * 4, b"", 1) is not None
    assert pages(index, [1] * 12) == [0, 1]


def test_a_removed_page_can_hold_another_prefix() -> None:
    index = PrefixIndex(PAGE)
    fill(index, [1] * 4, 0)
    index.remove(0)
    fill(index, [2] * 4, 0)
    assert (pages(index, [1] * 4), pages(index, [2] * 4)) == ([], [0])


def test_a_page_has_one_entry_only() -> None:
    index = PrefixIndex(PAGE)
    fill(index, [1] * 4, 0)
    with pytest.raises(CacheError, match="page 0 is in the prefix index already"):
        index.insert(None, [2] * 4, b"", 0)


@pytest.mark.parametrize("length", [0, 3, 5])
def test_a_page_that_is_not_full_is_refused(length: int) -> None:
    with pytest.raises(CacheError, match=f"a page holds 4 tokens, got {length}"):
        PrefixIndex(PAGE).insert(None, [1] * length, b"", 0)


def one_key(data: bytes) -> bytes:
    """The worst hash there is: everything collides."""
    return b"same"


def test_a_collision_of_tokens_does_not_match() -> None:
    index = PrefixIndex(PAGE, digest=one_key)
    fill(index, [1] * 4, 0)
    assert pages(index, [1] * 4) == [0]
    assert pages(index, [2] * 4) == []
    assert index.insert(None, [2] * 4, b"", 1) is None
    assert pages(index, [2] * 4) == []


def test_a_collision_of_namespaces_does_not_match() -> None:
    index = PrefixIndex(PAGE, digest=one_key)
    fill(index, [1] * 4, 0, b"mine")
    assert pages(index, [1] * 4, b"yours") == []
    assert index.insert(None, [1] * 4, b"yours", 1) is None


def test_a_collision_of_parents_does_not_match() -> None:
    def last_page_only(data: bytes) -> bytes:
        return data[-8 * PAGE :]

    index = PrefixIndex(PAGE, digest=last_page_only)
    fill(index, [1] * 4 + [9] * 4, 0)
    fill(index, [2] * 4, 2)
    assert pages(index, [1] * 4 + [9] * 4) == [0, 1]
    assert pages(index, [2] * 4 + [9] * 4) == [2]
    assert pages(index, [9] * 4) == []


def test_a_collision_with_a_parent_that_took_its_key_later_does_not_match() -> None:
    def last_page_only_and_blind_to_three(data: bytes) -> bytes:
        return data[-8 * PAGE :].replace(b"\x03", b"\x01")

    index = PrefixIndex(PAGE, digest=last_page_only_and_blind_to_three)
    fill(index, [1] * 4 + [9] * 4, 0)
    index.remove(0)
    fill(index, [3] * 4, 0)
    assert pages(index, [3] * 4 + [9] * 4) == [0]


def test_every_prefix_over_a_small_alphabet_is_told_apart_under_a_weak_hash() -> None:
    index = PrefixIndex(1, digest=lambda data: bytes([sum(data) % 3]))
    words = [list(word) for word in itertools.product(range(2), repeat=3)]
    truth: dict[tuple[int, ...], int] = {}
    for word in words:
        parent: PrefixEntry | None = None
        for end in range(1, 4):
            parent = index.insert(parent, [word[end - 1]], b"", len(truth))
            if parent is None:
                break
            truth.setdefault(tuple(word[:end]), parent.page)
    assert 0 < len(truth) <= 3
    for word in words:
        expected = [truth[tuple(word[:end])] for end in range(1, 4) if tuple(word[:end]) in truth]
        assert pages(index, word) == expected
