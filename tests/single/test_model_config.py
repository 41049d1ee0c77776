"""A model's shape: what can be is built as it was asked for, what cannot be is refused with the flag to change."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpipar.errors import ConfigError
from mpipar.model import ModelConfig, Transformer


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"family": "bert"}, "--model.family bert is not known; choose one of llama, gpt2"),
        ({"layers": 0}, "--model.layers 0 must be at least 1"),
        ({"dim": -4}, "--model.dim -4 must be at least 1"),
        ({"heads": 0}, "--model.heads 0 must be at least 1"),
        ({"kv_heads": 0}, "--model.kv-heads 0 must be at least 1"),
        ({"ffn_dim": 0}, "--model.ffn-dim 0 must be at least 1"),
        ({"max_seq_len": 0}, "--model.max-seq-len 0 must be at least 1"),
        ({"norm_eps": 0.0}, "--model.norm-eps 0.0 must be positive"),
        ({"rope_theta": float("nan")}, "--model.rope-theta nan must be positive"),
        ({"dim": 130, "heads": 4}, "--model.dim 130 is not a multiple of --model.heads 4"),
        ({"heads": 4, "kv_heads": 3}, "--model.heads 4 is not a multiple of --model.kv-heads 3"),
        ({"dim": 12, "heads": 4}, "heads of width 3, where rotary positions need an even width"),
    ],
)
def test_a_shape_that_cannot_be_names_the_flag(setting, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        ModelConfig(**setting)


def test_odd_heads_need_no_rotary_positions():
    assert ModelConfig(family="gpt2", dim=12, heads=4).head_dim == 3


def test_families_decide_what_is_not_given():
    llama, gpt2 = ModelConfig(dim=512, heads=8).resolved(), ModelConfig(family="gpt2", dim=512, heads=8).resolved()
    assert (llama.kv_heads, llama.ffn_dim, llama.tied) == (8, 1408, True)
    assert (gpt2.kv_heads, gpt2.ffn_dim, gpt2.tied) == (8, 2048, True)
    given_all = ModelConfig(dim=512, heads=8, kv_heads=2, ffn_dim=99, tied=True)
    assert given_all.resolved() == given_all
    assert ModelConfig().resolved().resolved() == ModelConfig().resolved()


def test_a_configuration_does_not_change():
    with pytest.raises(FrozenInstanceError):
        ModelConfig().layers = 3  # type: ignore[misc]


@given(
    layers=st.integers(-1, 3),
    dim=st.integers(-1, 24),
    heads=st.integers(-1, 6),
    kv_heads=st.none() | st.integers(-1, 6),
    family=st.sampled_from(["llama", "gpt2"]),
)
def test_a_shape_is_refused_or_can_be_built(layers, dim, heads, kv_heads, family):
    try:
        config = ModelConfig(family=family, layers=layers, dim=dim, heads=heads, kv_heads=kv_heads)
    except ConfigError as error:
        assert "--model." in str(error)
        return
    model = Transformer(config, vocab_size=7)
    assert len(model.layers) == layers
    assert model.num_parameters() == Transformer(config.resolved(), vocab_size=7).num_parameters()


def test_no_field_holds_what_toml_cannot_once_resolved():
    assert all(getattr(ModelConfig().resolved(), field.name) is not None for field in fields(ModelConfig))
