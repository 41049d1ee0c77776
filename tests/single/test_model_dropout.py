"""Dropout: a function of (seed, step, microbatch, module name)."""

from __future__ import annotations

import pytest
import torch

from mpipar.errors import ConfigError
from mpipar.model import ModelConfig, Transformer, begin_microbatch, initialise
from mpipar.model.dropout import Dropout


def build(**options: bool) -> Transformer:
    config = ModelConfig(layers=2, dim=32, heads=2, max_seq_len=16, dropout=0.25)
    model = Transformer(config, vocab_size=50, **options)
    initialise(model, seed=1)
    return model


def gradient(model: Transformer, *key: int) -> torch.Tensor:
    begin_microbatch(model, *key)
    model.zero_grad(set_to_none=True)
    model.loss(torch.arange(34).view(2, 17))[0].backward()
    assert model.embedding.weight.grad is not None
    return model.embedding.weight.grad


def test_the_same_microbatch_has_the_same_gradient() -> None:
    model = build()
    first = gradient(model, 1, 5, 0)
    gradient(model, 1, 5, 1)
    torch.rand(10)  # torch's own generator does not enter
    assert torch.equal(gradient(build(), 1, 5, 0), first)


@pytest.mark.parametrize("key", [(2, 5, 0), (1, 6, 0), (1, 5, 1)])
def test_another_one_has_another(key: tuple[int, int, int]) -> None:
    model = build()
    assert not torch.equal(gradient(model, *key), gradient(model, 1, 5, 0))


def test_recomputed_activations_meet_the_same_mask() -> None:
    assert torch.equal(gradient(build(checkpoint_activations=True), 1, 5, 0), gradient(build(), 1, 5, 0))


def test_modules_have_masks_of_their_own() -> None:
    model = build()
    begin_microbatch(model, 1, 5, 0)
    x = torch.ones(1000)
    masks = [module(x) for module in model.modules() if isinstance(module, Dropout)]
    assert len(masks) == 5
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def test_it_keeps_the_mean_and_does_nothing_in_evaluation() -> None:
    dropout = Dropout(0.25)
    x = torch.ones(100_000)
    assert dropout(x).unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert dropout(x).mean().item() == pytest.approx(1.0, abs=0.01)
    dropout.eval()
    assert dropout(x) is x


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_a_probability_is_one(p: float) -> None:
    with pytest.raises(ConfigError, match=r"--model\.dropout"):
        ModelConfig(dropout=p)
