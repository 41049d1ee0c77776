"""Words that are remembered: the same ids as the tokenizer gives, for any text."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import sys
import typing
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpipar.data import tokenizer, words
from mpipar.data.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(words._functions() is None, reason="words.c was not compiled")

SAMPLE = "It's 12 o'clock: they'll say 'we've  been'.\n\n\tdef f(x_1):  # é ünï 中文 x²\n    return [x_1]\r\n" * 20
PARTS = [*"ab'sxr1 \n\t.,_(é²中\u0301\u00a0\u2003\u3000\x85\x1c\x00", "'ll", "'re", "'s", "\U0001f600", "  ", " the"]


@pytest.fixture(scope="module")
def remembering() -> Tokenizer:
    trained = tokenizer.train([SAMPLE], 400)
    assert trained._words is not None
    return trained


@pytest.fixture(scope="module")
def plain(remembering: Tokenizer) -> Tokenizer:
    """The same tokenizer without the words."""
    made = Tokenizer(remembering.text)
    made._words = None
    return made


def same(remembering: Tokenizer, plain: Tokenizer, texts: list[str]) -> None:
    documents = [text.encode() for text in texts]
    for text, ids, expected in zip(texts, remembering.encode(documents), plain.encode(documents), strict=True):
        assert ids.dtype == expected.dtype == np.uint32
        assert np.array_equal(ids, expected), text


@settings(max_examples=200)
@given(texts=st.lists(st.lists(st.sampled_from(PARTS), max_size=30).map("".join), min_size=1, max_size=5))
def test_any_text(remembering: Tokenizer, plain: Tokenizer, texts: list[str]) -> None:
    same(remembering, plain, texts)


def test_characters_of_all_kinds(remembering: Tokenizer, plain: Tokenizer) -> None:
    """Among letters, digits and signs, at ends, before spaces and behind them."""
    near_white_space = [*range(0x250), *range(0x1670, 0x1690), 0x180E, *range(0x1FF0, 0x2070), *range(0x2FF0, 0x3010)]
    elsewhere = [code for code in range(0x250, sys.maxunicode, 499) if not 0xD800 <= code < 0xE000]
    characters = map(chr, [*near_white_space, 0xFEFF, *elsewhere])
    same(remembering, plain, [f"a{c}b {c}1{c} {c}{c} \n{c}x.{c}," for c in characters])


@pytest.mark.parametrize("vocab_size", [260, 700, 3000])
def test_new_words_are_merged(vocab_size: int) -> None:
    """Of real text, by many merges: to the ids of the tokenizer, which is not asked."""
    texts = [inspect.getsource(module) for module in (argparse, ast, json.decoder, typing)]
    merging = tokenizer.train(texts[:2], vocab_size)
    plain = Tokenizer(merging.text)
    plain._words = None
    assert merging._words is not None
    asked: list[str] = []
    merging._words._encode_word = asked.append  # type: ignore[assignment]
    same(merging, plain, [*texts, "=" * 256, "ab" * 128])


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_words_that_cannot_be_merged_are_asked_for(
    plain: Tokenizer, monkeypatch: pytest.MonkeyPatch, ignore_merges: bool
) -> None:
    """Those that are not ASCII, or long; and all, where the model is more than merges."""
    content = json.loads(plain.text)
    content["model"]["ignore_merges"] = ignore_merges
    other, reference = Tokenizer(json.dumps(content)), Tokenizer(json.dumps(content))
    reference._words = None
    encode_word, asked = other._encode_word, []

    def ask(word: str) -> Sequence[int]:
        asked.append(word)
        return encode_word(word)

    monkeypatch.setattr(other, "_encode_word", ask)
    same(other, reference, ["one é " + "=" * 256])
    assert asked == ["one"] * ignore_merges + [" é", " " + "=" * 256]


def test_a_table_that_is_full_begins_anew(plain: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("_NUM_SLOTS", 16), ("_WORDS_BYTES", 300), ("_NUM_IDS", 300)):
        with monkeypatch.context() as patched:
            patched.setattr(words, name, size)
            texts = [SAMPLE, "".join(f"w{n} " for n in range(500)), "x" * 10_000, SAMPLE, ""]
            same(Tokenizer(plain.text), plain, texts)


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
        {"pre_tokenizer": {"type": "Whitespace"}},
    ],
)
def test_other_tokenizers_do_it_themselves(plain: Tokenizer, change: dict[str, object]) -> None:
    other = Tokenizer(json.dumps({**json.loads(plain.text), **change}))
    assert other._words is None
    assert len(other.encode([SAMPLE.encode()])[0]) > 100


def test_added_tokens_in_a_text_are_the_tokenizers_own(plain: Tokenizer) -> None:
    content = json.loads(plain.text)
    content["added_tokens"].append(
        {**content["added_tokens"][0], "id": plain.vocab_size, "content": "o'cl", "special": False}
    )
    other = Tokenizer(json.dumps(content))
    assert other._words is None
    assert plain.vocab_size in other.encode([SAMPLE.encode()])[0]
