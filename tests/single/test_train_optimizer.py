"""The learning rate, and which weights decay."""

from __future__ import annotations

import itertools
import math

from mpipar.model import ModelConfig, Transformer
from mpipar.train.config import TrainConfig
from mpipar.train.optimizer import build_optimizer, learning_rate


def test_warm_up_and_cosine() -> None:
    config = TrainConfig(steps=100, warmup_steps=10, lr=2.0, min_lr_ratio=0.1)
    rates = [learning_rate(config, step) for step in range(101)]
    assert math.isclose(rates[0], 0.2) and math.isclose(rates[9], 2.0) and math.isclose(rates[10], 2.0)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert math.isclose(rates[55], 2.0 * (0.1 + 0.9 / 2)) and math.isclose(rates[100], 0.2)


def test_no_warm_up_and_no_steps() -> None:
    assert learning_rate(TrainConfig(steps=0, warmup_steps=0, lr=1.0), 0) == 1.0


def test_matrices_decay_and_vectors_do_not() -> None:
    model = Transformer(ModelConfig(family="gpt2", layers=1, dim=8, heads=2), vocab_size=16)
    decaying, others = build_optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
    assert decaying["weight_decay"] == 0.3 and all(p.dim() >= 2 for p in decaying["params"])
    assert others["weight_decay"] == 0.0 and all(p.dim() < 2 for p in others["params"])
    assert len(decaying["params"]) + len(others["params"]) == len(list(model.parameters()))
