"""Conversations: exactly the tokens of answers count, whatever the contents say; bad records are named."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from mpipar.data import Samples, Shard, ShardSet, Tokenizer, tokenizer
from mpipar.data.conversations import ChatEncoder, compared, conversation
from mpipar.data.corpus import cut, list_files
from mpipar.data.documents import read_documents
from mpipar.data.shard import write_shard
from mpipar.data.shards import write_indices
from mpipar.data.skipped import RecordError, Tally
from mpipar.data.templates import ANSWERS, TEMPLATES, Template, Turn
from mpipar.errors import DataError
from mpipar.model import ModelConfig, Transformer, initialise
from mpipar.storage import ArrayFile, write_arrays

CHATML, LLAMA3, PLAIN = (TEMPLATES[name] for name in ("chatml", "llama3", "plain"))
MARKS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"]

Turns = Sequence[tuple[str, str]]


def with_marks(*added: str | AddedToken) -> Tokenizer:
    backend = Backend.from_str(tokenizer.train(["some words of a text, and some more " * 9], 280).text)
    backend.add_special_tokens([token for token in added if isinstance(token, str)])
    backend.add_tokens([token for token in added if not isinstance(token, str)])
    return Tokenizer(backend.to_str())


@pytest.fixture(scope="module")
def knows_all() -> Tokenizer:
    return with_marks(*MARKS)


@pytest.fixture(scope="module")
def knows_none() -> Tokenizer:
    return with_marks()


def document(turns: Turns) -> bytes:
    return json.dumps(turns).encode()


def encode(template: Template, made_by: Tokenizer, turns: Turns) -> tuple[list[int], list[bool]]:
    (ids,), (counted,) = ChatEncoder(template, made_by).encode([document(turns)])
    assert ids.dtype == np.uint32 and ids.shape == counted.shape
    return ids.tolist(), counted.tolist()


def rendered(template: Template, turns: Turns) -> tuple[str, str]:
    """The text of a conversation, and that of its answers with the marks that end them."""
    parts = [template.roles[role].before + content + template.roles[role].after for role, content in turns]
    answers = [content + template.roles[role].after for role, content in turns if role == ANSWERS]
    return template.begin + template.between.join(parts), "".join(answers)


# What counts

CONTENTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
HOSTILE = st.lists(st.sampled_from([*MARKS, "<|endoftext|>", "user\n", "assistant", "<", "|>"]) | CONTENTS).map("".join)
TURNS = st.lists(st.tuples(st.sampled_from(["system", "user", ANSWERS]), HOSTILE), min_size=1, max_size=6)


@settings(max_examples=60)
@given(turns=TURNS, name=st.sampled_from(sorted(TEMPLATES)), known=st.booleans())
def test_exactly_the_answers_count(
    knows_all: Tokenizer, knows_none: Tokenizer, turns: Turns, name: str, known: bool
) -> None:
    template, made_by = TEMPLATES[name], knows_all if known else knows_none
    ids, counted = encode(template, made_by, turns)
    text, answers = rendered(template, turns)
    assert ids[-1] == made_by.end_of_text and not counted[-1]
    assert made_by.decode(ids[:-1]) == text
    assert made_by.decode([token for token, counts in zip(ids, counted, strict=True) if counts]) == answers
    said = [made_by.decode([token]) for token in ids if token in made_by.added_tokens]
    if not known:
        assert said == ["<|endoftext|>"]
    elif name == "chatml":
        assert said == ["<|im_start|>", "<|im_end|>"] * len(turns) + ["<|endoftext|>"]
    elif name == "llama3":
        each = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        assert said == ["<|begin_of_text|>", *each * len(turns), "<|endoftext|>"]


def test_by_hand(knows_all: Tokenizer) -> None:
    ids, counted = encode(CHATML, knows_all, [("user", "a"), (ANSWERS, "b"), ("user", "c"), (ANSWERS, "d")])
    pieces = ["<|im_start|>", "user\n", "a", "<|im_end|>", "\n", "<|im_start|>", "assistant\n", "b", "<|im_end|>", "\n"]
    expected = [
        (token, piece == "b" or (at == 8))
        for at, piece in enumerate(pieces)
        for token in knows_all.encode_marked(piece).tolist()
    ]
    assert list(zip(ids, counted, strict=True))[: len(expected)] == expected
    assert sum(counted) == 4


def test_a_mark_that_is_declared_as_an_ordinary_token_cannot_be_said() -> None:
    """The library takes these for tokens in any text."""
    made_by = with_marks(AddedToken("<|im_start|>", special=False), AddedToken("<|im_end|>", special=False))
    ids, _ = encode(CHATML, made_by, [("user", "a<|im_end|>b<|im_start|>c"), (ANSWERS, "x")])
    said = [made_by.decode([token]) for token in ids if token in made_by.added_tokens]
    assert said == ["<|im_start|>", "<|im_end|>"] * 2 + ["<|endoftext|>"]


def test_white_space_that_a_tokenizer_has_added_may_be_said() -> None:
    made_by = with_marks("<|im_start|>", "<|im_end|>", AddedToken("\n", special=False))
    ids, counted = encode(CHATML, made_by, [("user", "a"), (ANSWERS, "b\nc")])
    assert made_by.decode([token for token, counts in zip(ids, counted, strict=True) if counts]) == "b\nc<|im_end|>"


def test_a_template_must_not_end_documents(knows_none: Tokenizer) -> None:
    template = Template({ANSWERS: Turn("", "<|endoftext|>")})
    with pytest.raises(DataError, match=r"has '<\|endoftext\|>' in it, which with this tokenizer ends documents"):
        ChatEncoder(template, knows_none)


# Shards and samples


def write(folder: Path, made_by: Tokenizer, shards: Sequence[Sequence[Turns]], split: str = "train") -> None:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(made_by.text)
    chat = ChatEncoder(CHATML, made_by)
    for index, conversations in enumerate(shards):
        documents, counted = chat.encode([document(turns) for turns in conversations])
        write_shard(folder, split, index, len(shards), documents, made_by, 1, counted)


SHARDS = st.lists(st.lists(TURNS, min_size=1, max_size=4), min_size=1, max_size=3)


@settings(max_examples=25)
@given(shards=SHARDS, seq_len=st.integers(1, 40), seed=st.integers(0, 99))
def test_each_token_of_an_answer_counts_once_an_epoch(
    tmp_path_factory: pytest.TempPathFactory,
    knows_all: Tokenizer,
    shards: Sequence[Sequence[Turns]],
    seq_len: int,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("chats")
    write(folder, knows_all, shards)
    write_indices(folder)
    encoded = [[encode(CHATML, knows_all, turns) for turns in conversations] for conversations in shards]
    flat = [[pair for ids, counts in shard for pair in zip(ids, counts, strict=True)] for shard in encoded]
    with ShardSet.open(folder, "train") as source:
        assert source.num_counted == sum(counts for shard in flat for _, counts in shard)
        samples = Samples([source], seq_len, seed)
        tokens, _, counted = samples.read(0, samples.num_samples)
        seen = []
        for row, _, shard, offset in zip(range(len(tokens)), *samples.locate(0, samples.num_samples), strict=True):
            for t in range(seq_len):
                if counted is None or counted[row, t]:
                    seen.append((shard, offset + t + 1))
                    assert tokens[row, t + 1] == flat[shard][offset + t + 1][0]
        assert sorted(seen) == [
            (s, at) for s, shard in enumerate(flat) for at, (_, counts) in enumerate(shard) if counts and at
        ]
        for each in source.shards:
            each.verify()


TALK: Turns = [
    ("system", "be brief"),
    ("user", "what is a word?"),
    (ANSWERS, "some text"),
    ("user", "more"),
    (ANSWERS, "no"),
]


@pytest.mark.parametrize("apart", [False, True])
def test_the_loss_is_that_of_a_mask_made_by_hand(tmp_path: Path, knows_all: Tokenizer, apart: bool) -> None:
    """In float64, mixed with text, of which all counts."""
    write(tmp_path / "chats", knows_all, [[TALK, TALK[1:3], TALK[1:]]])
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "tokenizer.json").write_text(knows_all.text)
    write_shard(plain, "train", 0, 1, knows_all.encode([b"some words of a text, " * 30]), knows_all, 660)
    ids, mask = zip(*(encode(CHATML, knows_all, turns) for turns in (TALK, TALK[1:3], TALK[1:])), strict=True)
    chat_tokens, chat_mask = list(chain(*ids)), list(chain(*mask))
    seq_len = 24
    model = Transformer(
        ModelConfig(layers=1, dim=16, heads=2, max_seq_len=seq_len), vocab_size=knows_all.vocab_size
    ).double()
    initialise(model, 0, std=0.2)
    end_of_text = knows_all.end_of_text if apart else None
    with ShardSet.open(tmp_path / "chats", "train") as chats, ShardSet.open(plain, "train") as text:
        samples = Samples([chats, text], seq_len, 3, end_of_text=end_of_text)
        num = samples.num_samples
        batch = samples.read(0, num)
        loss, count = model.loss(*batch)
        logits = model(batch.tokens[:, :-1], batch.begins).log_softmax(dim=-1).detach()
        expected, expected_count = 0.0, 0
        for row, source, _, offset in zip(range(num), *samples.locate(0, num), strict=True):
            length = min(seq_len, (chats, text)[source].num_tokens - offset - 1)
            for t in range(length):
                target = int(batch.tokens[row, t + 1])
                if source == 1 or chat_mask[offset + t + 1]:
                    expected -= float(logits[row, t, target])
                    expected_count += 1
                if source == 0:
                    assert target == chat_tokens[offset + t + 1]
        assert count == expected_count > sum(chat_mask)
        assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_a_microbatch_in_which_nothing_counts(tmp_path: Path, knows_all: Tokenizer) -> None:
    write(tmp_path, knows_all, [[[("user", "some words of a text " * 9), (ANSWERS, "no")]]])
    model = Transformer(ModelConfig(layers=1, dim=16, heads=2, max_seq_len=8), vocab_size=knows_all.vocab_size)
    initialise(model, 0)
    with ShardSet.open(tmp_path, "train") as source:
        samples = Samples([source], 8, 0)
        batches = [samples.read(index, 1) for index in range(samples.num_samples)]
    (silent, *_) = [batch for batch in batches if batch.counted is not None and not batch.counted.any()]
    loss, count = model.loss(*silent)
    loss.backward()
    assert (loss.item(), count.item()) == (0.0, 0)
    assert all(not weight.grad.any() for weight in model.parameters() if weight.grad is not None)


def test_shards_in_which_all_counts_are_as_before(tmp_path: Path, knows_all: Tokenizer) -> None:
    write_shard(tmp_path, "train", 0, 1, knows_all.encode([b"some text"]), knows_all, 9)
    with ArrayFile(tmp_path / "train-00000.h5") as file:
        assert file.names == ("documents", "tokens", "unigrams")
        assert file.attributes["version"] == 1 and "num_counted" not in file.attributes
    with Shard(tmp_path / "train-00000.h5") as shard:
        assert shard.read_counted(0, 4) is True and shard.num_counted == shard.num_tokens


def test_verify_looks_at_what_counts(tmp_path: Path, knows_all: Tokenizer) -> None:
    write(tmp_path, knows_all, [[TALK]])
    path = tmp_path / "train-00000.h5"
    with ArrayFile(path) as file:
        arrays, attributes = {name: file[name].array() for name in file.names}, dict(file.attributes)
    arrays["counted"][-1] ^= 1
    write_arrays(path, arrays, attributes)
    with Shard(path) as shard, pytest.raises(DataError, match="what counts does not fit the tokens"):
        shard.verify()


# Records


def record(*turns: tuple[str, str]) -> dict[str, object]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_forms_of_records() -> None:
    turns = [["system", "be brief"], ["user", "é?"], ["assistant", "4"]]
    one = {"id": 7, **record(*((role, content) for role, content in turns))}
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    other = {"conversations": [{"from": names[role], "value": content} for role, content in turns]}
    assert conversation(one, CHATML) == conversation(other, CHATML)
    assert json.loads(conversation(one, CHATML)) == turns
    assert json.loads(compared(conversation(one, CHATML))) == turns[1:]


@pytest.mark.parametrize(
    ("bad", "reason", "detail"),
    [
        ([1], "no messages", "got no object"),
        ({"text": "a"}, "no messages", "expected the field 'messages', got 'text'"),
        ({"messages": []}, "no messages", "expected a list of messages in the field 'messages'"),
        ({"messages": ["a"]}, "no messages", "message 1: expected an object with texts in its fields 'role'"),
        ({"messages": [{"role": "user", "content": None}]}, "no messages", "message 1: expected"),
        ({"conversations": [{"from": "human"}]}, "no messages", "in its fields 'from' and 'value'"),
        (record(("user", "a"), ("tool", "b")), "unknown role", "message 2 is of 'tool', the template has system, user"),
        (record(("user", "a"), (ANSWERS, " \n")), "no answer", "message 2 is an empty one"),
        (record(("user", "a")), "no answer", "no message is of 'assistant'"),
    ],
)
def test_bad_records(bad: object, reason: str, detail: str) -> None:
    with pytest.raises(RecordError, match=detail) as raised:
        conversation(bad, CHATML)
    assert raised.value.reason == reason


def test_bad_records_are_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    good = record(("user", "a"), (ANSWERS, "b"))
    lines = [
        json.dumps(good),
        json.dumps(record(("user", "a"))),
        "nonsense",
        '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}',
        json.dumps(good),
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(lines) + "\n")
    noted = []

    class Noting(Tally):
        def skip(self, number: int | None, reason: str, detail: str) -> None:
            noted.append((number, reason))

    (piece,) = cut(list_files([str(path)], tmp_path / "out", []), "text", [])
    assert list(read_documents(piece, CHATML, Noting())) == [conversation(good, CHATML)] * 2
    assert noted == [(2, "no answer"), (3, "not JSON"), (4, "not UTF-8")]
