"""From tokens to text: no broken characters, and stop strings found wherever the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from foveate.server.detokenizer import Detokenizer
from foveate.server.request import SamplingParams
from foveate.server.stopping import StopChecker

TEXT = "the cat sat on the mat, naïve café — 日本語 テスト 🙂🙃 and more words of the text " * 3


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level tokenizer whose tokens often end within a character."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def deltas(tokenizer, ids, prompt=()):
    detokenizer = Detokenizer(tokenizer, list(prompt), SamplingParams())
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@given(ids=st.lists(st.integers(0, 255), max_size=60))
@settings(max_examples=200)
def test_deltas_make_up_the_text_of_any_tokens(tokenizer, ids):
    assert "".join(deltas(tokenizer, ids)) == decode(tokenizer, ids)


@given(text=st.text(max_size=40))
@settings(max_examples=200)
def test_valid_text_never_shows_a_broken_character(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    parts = deltas(tokenizer, ids, tokenizer.encode("prompt"))
    assert "".join(parts) == text
    assert text.count("\ufffd") == sum(part.count("\ufffd") for part in parts)


def test_a_character_comes_out_when_it_is_whole(tokenizer):
    ids = [
        tokenizer.convert_tokens_to_ids(char) for char in pre_tokenizers.ByteLevel(False).pre_tokenize_str("🦊")[0][0]
    ]
    assert len(ids) == 4
    assert deltas(tokenizer, ids) == ["", "", "", "🦊", ""]


def test_an_endless_run_of_bad_bytes_still_comes_out(tokenizer):
    bad = tokenizer.convert_tokens_to_ids(pre_tokenizers.ByteLevel(False).pre_tokenize_str("🦊")[0][0][1])
    parts = deltas(tokenizer, [bad] * 500)
    assert max(map(len, parts)) <= 30
    assert "".join(parts) == "\ufffd" * 500


def bytes_of(tokenizer, text):
    """One token per byte."""
    chars = pre_tokenizers.ByteLevel(False).pre_tokenize_str(text)[0][0]
    return [tokenizer.convert_tokens_to_ids(char) for char in chars]


def test_bad_bytes_come_out_as_soon_as_nothing_can_mend_them(tokenizer):
    """Three may still become a character, so three are held back and no more."""
    shown = 0
    for place, part in enumerate(deltas(tokenizer, [bytes_of(tokenizer, "🦊")[1]] * 200)[:-1], 1):
        shown += len(part)
        assert place - shown <= 3


@pytest.mark.parametrize("before", range(18, 30), ids="behind{}".format)
@pytest.mark.parametrize("char", ["🦊", "日", "é"], ids=["4-bytes", "3-bytes", "2-bytes"])
def test_a_character_behind_bad_bytes_survives_what_is_forgotten(tokenizer, before, char):
    """Tokens that are given up, so that the cost stays bounded, are none that the character may still need."""
    ids = [bytes_of(tokenizer, "🦊")[1]] * before + bytes_of(tokenizer, char)
    assert "".join(deltas(tokenizer, ids)) == decode(tokenizer, ids) == "\ufffd" * before + char


@pytest.mark.parametrize("char", ["🦊", "日", "é"], ids=["4-bytes", "3-bytes", "2-bytes"])
def test_a_decoder_that_writes_a_sign_per_byte_shows_none_of_a_character(char):
    """Tokenizers with byte fallback do; a byte-level one writes a single sign for the beginning of a character."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256}
    inner = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer, ids = PreTrainedTokenizerFast(tokenizer_object=inner), list(char.encode())
    assert decode(tokenizer, ids[:-1]) == "\ufffd" * (len(ids) - 1)
    assert deltas(tokenizer, [256, *ids, 256]) == ["a", *[""] * (len(ids) - 1), char, "a", ""]


@pytest.fixture(scope="module")
def spaces_first():
    """A sentencepiece-like tokenizer: a space begins each word, and that of the first word is no text."""
    inner = Tokenizer(models.BPE({"▁": 0, "a": 1, "b": 2, "▁b": 3, "<end>": 4}, [("▁", "b")]))
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    inner.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


@pytest.mark.parametrize("prompt", [[], [0], [0, 0], [4], [4, 0], [1], [3]], ids=str)
@pytest.mark.parametrize("answer", [[3], [0, 3], [0, 4, 3], [4, 3], [0, 0, 1], [2, 0, 3]], ids=str)
def test_a_space_that_begins_a_text_counts_before_what_follows(spaces_first, prompt, answer):
    """Alone it has no text, as a special token has none anywhere; but behind it the next space is one."""
    before = decode(spaces_first, prompt)
    assert before + "".join(deltas(spaces_first, answer, prompt)) == decode(spaces_first, prompt + answer)


WORDS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple)


def feed(checker, parts):
    out = ""
    for part in parts:
        text, stopped = checker.push(part)
        out += text
        if stopped:
            return out, True
    return out + checker.flush(), False


@given(parts=st.lists(st.text("abc", max_size=5), max_size=12), stop=WORDS, include=st.booleans())
@settings(max_examples=400)
def test_stop_strings_are_found_however_the_text_is_cut(parts, stop, include):
    text = "".join(parts)
    ends = [(text.find(word) + len(word), -len(word)) for word in stop if word in text]
    got = feed(StopChecker(SamplingParams(stop=stop, include_stop_str_in_output=include)), parts)
    if not ends:
        assert got == (text, False)
    else:
        end, length = min(ends)
        assert got == (text[: end if include else end + length], True)


def test_only_what_may_begin_a_stop_string_is_held_back():
    checker = StopChecker(SamplingParams(stop=("</end>",)))
    assert checker.push("hello <") == ("hello ", False)
    assert checker.push("b>") == ("<b>", False)
    assert checker.push("</en") == ("", False)
    assert checker.push("d> more") == ("", True)


def test_no_stop_before_min_tokens():
    checker = StopChecker(SamplingParams(stop=("ab",)))
    assert checker.push("ab", active=False) == ("ab", False)
    assert checker.push("ab") == ("", True)
