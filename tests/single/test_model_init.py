"""Initial weights: a function of (seed, name), of nothing else."""

from __future__ import annotations

import math

import pytest
import torch

from mpipar.model import ModelConfig, Transformer, initialise

RESIDUAL = ("attention.wo.weight", "feed_forward.down.weight")


def build(seed=0, vocab_size=60, dtype=torch.float32, **settings):
    model = Transformer(ModelConfig(**{"layers": 2, "dim": 32, **settings}), vocab_size=vocab_size).to(dtype)
    initialise(model, seed)
    return dict(model.named_parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_global_generator_has_no_say(family):
    torch.manual_seed(1)
    first = build(family=family)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = build(family=family)
    assert all(torch.equal(first[name], second[name]) for name in first)
    model = Transformer(ModelConfig(), vocab_size=10)
    state = torch.get_rng_state()
    initialise(model, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_names_and_seeds_draw_independently():
    weights = build(kv_heads=None, ffn_dim=32)
    other = build(seed=1, ffn_dim=32)
    drawn = {name: tensor for name, tensor in weights.items() if tensor.dim() > 1}
    assert len({tensor.flatten()[0].item() for tensor in drawn.values()}) == len(drawn)
    assert not any(torch.equal(drawn[name], other[name]) for name in drawn)


def test_another_layer_changes_no_draw_of_the_others():
    shallow, deep = build(layers=2), build(layers=5)
    for name, tensor in shallow.items():
        if name.endswith(RESIDUAL):
            torch.testing.assert_close(tensor * math.sqrt(2 * 2), deep[name] * math.sqrt(2 * 5))
        else:
            assert torch.equal(tensor, deep[name])


def test_another_head_changes_no_draw_of_the_others():
    tied, untied = build(tied=True), build(tied=False)
    assert set(untied) - set(tied) == {"head.weight"}
    assert all(torch.equal(tied[name], untied[name]) for name in tied)


def test_another_dtype_starts_from_the_same_values():
    single, double = build(), build(dtype=torch.float64)
    for name, tensor in single.items():
        torch.testing.assert_close(tensor, double[name].float(), rtol=1e-6, atol=0)


def test_the_values_that_every_run_starts_from():
    """Pins the draw: a change of it changes every run, and must be meant."""
    weights = build()
    assert weights["layers.1.attention.wq.weight"].flatten()[:2].tolist() == pytest.approx(
        [-0.020237, 0.020636], rel=1e-4
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scales(family):
    for name, tensor in build(family=family, dim=256, heads=4, vocab_size=500, layers=8).items():
        if tensor.dim() > 1:
            expected = 0.02 / math.sqrt(16) if name.endswith(RESIDUAL) else 0.02
            assert tensor.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(tensor.mean().item()) < 5 * expected / math.sqrt(tensor.numel()), name
        else:
            assert torch.equal(tensor, torch.zeros_like(tensor) if name.endswith("bias") else torch.ones_like(tensor))
