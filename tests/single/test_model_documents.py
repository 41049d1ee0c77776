"""Documents in one sequence: the model computes of them what it computes of each alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpipar.model import ModelConfig, Transformer, initialise
from mpipar.model.documents import document_lengths, positions_within

VOCAB = 40
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "tied": False},
    "llama-grouped": {"family": "llama", "kv_heads": 2},
    "gpt2": {"family": "gpt2"},
}


def build(shape: str, *, dtype: torch.dtype = torch.float64, checkpointed: bool = False) -> Transformer:
    config = ModelConfig(**{"layers": 2, "dim": 24, "heads": 4, "max_seq_len": 64, **SHAPES[shape]})
    model = Transformer(config, vocab_size=VOCAB, checkpoint_activations=checkpointed).to(dtype)
    initialise(model, 0, std=0.2)  # larger than for training, so that attention is far from uniform
    return model


def draw(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def mark(batch: int, length: int, places: list[list[int]]) -> Tensor:
    begins = torch.zeros((batch, length), dtype=torch.bool)
    for row, at in zip(begins, places, strict=True):
        row[at] = True
    return begins


PLACES = st.lists(st.lists(st.integers(0, 16), max_size=6), min_size=1, max_size=4)


@given(places=PLACES)
def test_lengths_and_positions(places: list[list[int]]) -> None:
    begins = mark(len(places), 17, places)
    lengths, positions = [], []
    for at in places:
        cuts = sorted({0, *at, 17})
        sizes = [end - begin for begin, end in pairwise(cuts)]
        lengths += sizes
        positions.append([t for size in sizes for t in range(size)])
    assert document_lengths(begins).tolist() == lengths
    assert positions_within(begins).tolist() == positions


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=12)
@given(places=PLACES, seed=st.integers(0, 1000))
def test_packed_documents_are_those_one_by_one(shape: str, places: list[list[int]], seed: int) -> None:
    """Loss and gradients. A document's last prediction is of the token that begins the next: an end of text."""
    model = build(shape)
    tokens, begins = draw(len(places), 18, seed), mark(len(places), 17, places)
    loss, count = model.loss(tokens, begins)
    alone = []
    for row, marked in zip(tokens, begins, strict=True):
        cuts = sorted({0, *marked.nonzero().flatten().tolist(), 17})
        alone += [model.loss(row[None, begin : end + 1]) for begin, end in pairwise(cuts)]
    expected = torch.stack([one for one, _ in alone]).sum()
    assert count == sum(one for _, one in alone) == 17 * len(places)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours, theirs = (torch.autograd.grad(value, parameters) for value in (loss, expected))
    for name, one, other in zip(names, ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-11, atol=1e-11), name


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_before_a_document_does_not_matter(shape: str) -> None:
    model, tokens = build(shape), draw(1, 12)
    begins = mark(1, 12, [[5]])
    changed = tokens.clone()
    changed[:, :5] = (changed[:, :5] + 1) % VOCAB
    before, after = model(tokens, begins), model(changed, begins)
    assert torch.equal(before[:, 5:], after[:, 5:])
    assert not torch.isclose(before[:, :5], after[:, :5]).all(-1).any()
    assert not torch.isclose(model(tokens)[:, 5:], before[:, 5:]).all(-1).any()  # joined, it does


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_marked_is_one_document(shape: str) -> None:
    model, tokens = build(shape), draw(3, 12)
    torch.testing.assert_close(model(tokens, mark(3, 12, [[], [0], []])), model(tokens), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_activation_checkpointing_changes_no_bit(autocast: bool) -> None:
    results = []
    for checkpointed in (False, True):
        model = build("llama", dtype=torch.float32, checkpointed=checkpointed)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = model.loss(draw(2, 18), mark(2, 17, [[3, 9], [11]]))
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*results, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, where its graph breaks
@pytest.mark.parametrize("shape", SHAPES)
def test_it_compiles(shape: str) -> None:
    model = build(shape, dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(model.loss, backend="eager")
    for places in ([[3, 9], [11]], [[], [1, 2, 3]], [[5], [16]]):
        begins = mark(2, 17, places)
        torch.testing.assert_close(compiled(draw(2, 18), begins)[0], model.loss(draw(2, 18), begins)[0])


@given(places=PLACES)
@settings(max_examples=10)
def test_only_what_counts_is_counted(places: list[list[int]]) -> None:
    model, tokens = build("llama"), draw(len(places), 18)
    counted = ~mark(len(places), 17, places)
    loss, count = model.loss(tokens, counted=counted)
    logits = model(tokens[:, :-1]).log_softmax(-1)
    each = -logits.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    assert count == int(counted.sum())
    torch.testing.assert_close(loss, each[counted].sum(), rtol=1e-12, atol=1e-12)


def test_counting_all_changes_no_bit() -> None:
    model, tokens = build("llama", dtype=torch.float32), draw(2, 18)
    one, other = model.loss(tokens), model.loss(tokens, counted=torch.ones((2, 17), dtype=torch.bool))
    assert torch.equal(one[0], other[0]) and one[1] == other[1]
