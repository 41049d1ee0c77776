"""Chat templates: built in or a file of one's own; with what else they make the recipe of a data set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpipar.data import Tokenizer, tokenizer
from mpipar.data.conversations import ChatEncoder
from mpipar.data.recipe import PackSettings, prepare
from mpipar.data.templates import ANSWERS, TEMPLATES, Template, Turn, find_template
from mpipar.errors import ConfigError, DataError

RECORD = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})


@pytest.fixture(scope="module")
def made_by() -> Tokenizer:
    return tokenizer.train(["some words of a text, and some more " * 9], 280)


TOML = """
begin = "<<"
between = "--"
[user]
before = "U:"
[assistant]
before = "A:"
after = "."
[tool]
"""


def test_a_template_of_ones_own(tmp_path: Path, made_by: Tokenizer) -> None:
    path = tmp_path / "own.toml"
    path.write_text(TOML)
    template = find_template(str(path))
    assert template == Template(
        {"user": Turn("U:"), ANSWERS: Turn("A:", "."), "tool": Turn()}, begin="<<", between="--"
    )
    turns = [["user", "a"], ["tool", "t"], [ANSWERS, "b"]]
    (ids,), _ = ChatEncoder(template, made_by).encode([json.dumps(turns).encode()])
    assert made_by.decode(ids[:-1].tolist()) == "<<U:a--t--A:b."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[user]", r"has no section \[assistant\]"),
        ("[assistant]\nbegin = 'a'", r"own\.toml: \[assistant\]: begin = 'a': expected texts for before and after"),
        ("start = 'a'\n[assistant]", "start = 'a': expected texts for begin and between"),
        ("[assistant]\nafter = 1", "after = 1: expected texts"),
        ("a b", "cannot be read"),
    ],
)
def test_bad_templates(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "own.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        find_template(str(tmp_path / "own.toml"))


def test_no_such_template() -> None:
    with pytest.raises(
        ConfigError, match=r"--chat chatmel: there is no such template\. Give chatml, llama3, plain, or a TOML"
    ):
        find_template("chatmel")


def test_what_is_no_jsonl_file_is_skipped(tmp_path: Path, made_by: Tokenizer) -> None:
    (tmp_path / "tokenizer").write_text(made_by.text)
    inputs = tmp_path / "in"
    inputs.mkdir()
    (inputs / "readme.txt").write_text("of what is here")
    settings = PackSettings(tokenizer=str(tmp_path / "tokenizer"), chat="chatml")
    with pytest.raises(
        DataError, match=r"hold no conversations.*\n.*readme\.txt: no messages \(conversations are read from"
    ):
        prepare([str(inputs)], tmp_path / "out", settings)
    (inputs / "a.jsonl").write_text(RECORD + "\n")
    recipe = prepare([str(inputs)], tmp_path / "out", settings)
    assert recipe.form == TEMPLATES["chatml"] and [skip.reason for skip in recipe.skipped] == ["no messages"]


def test_the_template_is_part_of_the_recipe(tmp_path: Path, made_by: Tokenizer) -> None:
    (tmp_path / "tokenizer").write_text(made_by.text)
    (tmp_path / "a.jsonl").write_text("{}")
    own = tmp_path / "own.toml"
    prints = []
    for text in (TOML, TOML, TOML.replace("U:", "V:")):
        own.write_text(text)
        settings = PackSettings(tokenizer=str(tmp_path / "tokenizer"), chat=str(own))
        prints.append(prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", settings).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_a_tokenizer_has_to_be_given() -> None:
    with pytest.raises(ConfigError, match="--chat needs --tokenizer"):
        PackSettings(chat="chatml")
