"""The tokenizer: any text comes back, training repeats itself, and what is no tokenizer is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models

from mpipar.data import tokenizer
from mpipar.errors import DataError

TEXTS = [f"def function_{n}(argument):\n    return argument + {n}\n" for n in range(300)]


@pytest.fixture(scope="module")
def trained() -> tokenizer.Tokenizer:
    return tokenizer.train(TEXTS, 400)


def test_training_is_deterministic(trained: tokenizer.Tokenizer) -> None:
    assert tokenizer.train(iter(TEXTS), 400).text == trained.text
    assert trained.vocab_size == 400
    assert trained.end_of_text == 0


@given(text=st.text())
def test_any_text_comes_back(trained: tokenizer.Tokenizer, text: str) -> None:
    (ids,) = trained.encode([text.encode()])
    assert ids[-1] == trained.end_of_text
    assert trained.decode(ids[:-1].tolist()) == text
    assert (ids < trained.vocab_size).all()


def test_names_of_special_tokens_in_a_text_are_letters(trained: tokenizer.Tokenizer) -> None:
    (ids,) = trained.encode([b"a <|endoftext|> b"])
    assert trained.end_of_text not in ids[:-1]
    assert trained.decode(ids.tolist()) == "a <|endoftext|> b<|endoftext|>"


def test_little_text_gives_a_small_vocabulary() -> None:
    assert 257 <= tokenizer.train(["ab ab"], 5000).vocab_size < 270


def test_identity_is_that_of_the_file(tmp_path: Path, trained: tokenizer.Tokenizer) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(trained.text)
    assert tokenizer.load(path).identity == tokenizer.identity(path.read_bytes()) == trained.identity


def test_settings_of_a_given_file_cut_nothing_off(trained: tokenizer.Tokenizer) -> None:
    backend = Backend.from_str(trained.text)
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    (ids,) = tokenizer.Tokenizer(backend.to_str()).encode([b"a text of more than four tokens"])
    assert 5 < ids.size < 64


def test_other_names_for_the_end_of_text() -> None:
    backend = Backend(models.WordLevel({"a": 0, "</s>": 7}, unk_token="a"))
    given = tokenizer.Tokenizer(backend.to_str())
    assert (given.end_of_text, given.vocab_size) == (7, 8)


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match=r"cannot read the tokenizer .*No such file"):
        tokenizer.load(path)
    for content in (b"{}", b"", b"[1, 2]", json.dumps({"model": {"type": "BPE"}}).encode()):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer"):
            tokenizer.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        tokenizer.load(path)
    path.write_text(Backend(models.WordLevel({"a": 0}, unk_token="a")).to_str())
    with pytest.raises(DataError, match="no token that ends a text"):
        tokenizer.load(path)
