"""The transformer against plain formulas: what it computes, what it may look at, what its gradients are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mpipar.errors import ConfigError
from mpipar.model import ModelConfig, Transformer, initialise
from mpipar.model.attention import Attention, rotary_table, rotate

VOCAB = 50
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "tied": False},
    "llama-grouped": {"family": "llama", "kv_heads": 2, "tied": False},
    "llama-one-kv-head-tied": {"family": "llama", "kv_heads": 1},
    "gpt2": {"family": "gpt2"},
    "gpt2-untied": {"family": "gpt2", "tied": False},
}


def build(shape="llama", *, seed=0, dtype=torch.float64, **settings):
    config = ModelConfig(**{"layers": 2, "dim": 24, "heads": 4, "max_seq_len": 16, **SHAPES[shape], **settings})
    model = Transformer(config, vocab_size=VOCAB).to(dtype)
    initialise(model, seed, std=0.2)  # larger than for training, so that attention is far from uniform
    return model


def draw_tokens(batch=2, length=12, seed=0):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def reference(model, tokens):
    """Logits of [B, T] in loops over sequences, heads and tokens, with complex numbers for the rotation."""
    weights = dict(model.named_parameters())
    config, family = model.config, model.config.family
    width, per_group = config.head_dim, config.heads // config.num_kv_heads

    def linear(x, name):
        y = x @ weights[f"{name}.weight"].T
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    def norm(x, name):
        if family == "gpt2":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weights[f"{name}.weight"]
        return x + weights[f"{name}.bias"] if family == "gpt2" else x

    def turn(x):  # [T, D]
        half = width // 2
        pairs = torch.complex(x[:, :half], x[:, half:])
        angles = torch.arange(len(x))[:, None] * config.rope_theta ** (-2 * torch.arange(half).double() / width)
        turned = pairs * torch.exp(1j * angles)
        return torch.cat((turned.real, turned.imag), dim=1)

    def attention(x, name):
        q, k, v = (linear(x, f"{name}.{part}") for part in ("wq", "wk", "wv"))
        heads = []
        for head in range(config.heads):
            group = slice(head // per_group * width, (head // per_group + 1) * width)
            qh, kh, vh = q[:, head * width : (head + 1) * width], k[:, group], v[:, group]
            if family == "llama":
                qh, kh = turn(qh), turn(kh)
            rows = [(qh[t] @ kh[: t + 1].T / math.sqrt(width)).softmax(-1) @ vh[: t + 1] for t in range(len(x))]
            heads.append(torch.stack(rows))
        return linear(torch.cat(heads, dim=1), f"{name}.wo")

    def feed_forward(x, name):
        up = linear(x, f"{name}.up")
        if family == "llama":
            gate = linear(x, f"{name}.gate")
            return linear(gate * gate.sigmoid() * up, f"{name}.down")
        return linear(0.5 * up * (1 + (math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)).tanh()), f"{name}.down")

    def sequence(ids):
        x = weights["embedding.weight"][ids]
        if family == "gpt2":
            x = x + weights["positions.weight"][: len(ids)]
        for layer in range(config.layers):
            name = f"layers.{layer}"
            x = x + attention(norm(x, f"{name}.attention_norm"), f"{name}.attention")
            x = x + feed_forward(norm(x, f"{name}.feed_forward_norm"), f"{name}.feed_forward")
        return norm(x, "norm") @ weights["embedding.weight" if config.tied else "head.weight"].T

    return torch.stack([sequence(ids) for ids in tokens])


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_the_formulas(shape):
    model, tokens = build(shape), draw_tokens()
    torch.testing.assert_close(model(tokens), reference(model, tokens), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_the_formulas(shape):
    model, tokens = build(shape), draw_tokens()
    loss, count = model.loss(tokens)
    logits = reference(model, tokens[:, :-1])
    expected = -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).sum()
    assert count == 22
    torch.testing.assert_close(loss, expected)
    names, parameters = zip(*model.named_parameters(), strict=True)
    for name, one, other in zip(
        names, torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9), name


def test_parameter_names():
    """They are the names in checkpoints: changing one breaks every checkpoint there is."""
    layer = ["attention.wq", "attention.wk", "attention.wv", "attention.wo"]
    llama = [*layer, "attention_norm", "feed_forward_norm", "feed_forward.gate", "feed_forward.up", "feed_forward.down"]
    expected = {f"layers.{i}.{name}.weight" for i in range(2) for name in llama}
    names = {name for name, _ in build("llama").named_parameters()}
    assert names == expected | {"embedding.weight", "norm.weight", "head.weight"}
    gpt2 = {name for name, _ in build("gpt2").named_parameters()}
    assert {name for name in gpt2 if name.endswith(".weight")} == (
        {name for name in expected if ".gate." not in name} | {"embedding.weight", "norm.weight", "positions.weight"}
    )
    assert {name for name in gpt2 if name.endswith(".bias")} == {
        name.replace(".weight", ".bias") for name in expected if ".gate." not in name
    } | {"norm.bias"}
    assert not list(build("llama").buffers()), "a buffer would be converted, saved or broadcast with the weights"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("position", [0, 5, 11])
def test_a_later_token_changes_no_earlier_logits(shape, position):
    model, tokens = build(shape), draw_tokens()
    changed = tokens.clone()
    changed[:, position] = (changed[:, position] + 1) % VOCAB
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.isclose(before[:, position:], after[:, position:]).all(-1).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_sequences_of_a_batch_do_not_meet(shape):
    model, tokens = build(shape), draw_tokens(batch=3)
    torch.testing.assert_close(model(tokens), torch.cat([model(row[None]) for row in tokens]))


def test_grouped_attention_equals_repeated_heads():
    grouped = build("llama-grouped")
    whole = build("llama")
    state = grouped.state_dict()
    for name in list(state):
        if ".wk." in name or ".wv." in name:
            state[name] = state[name].unflatten(0, (2, 6)).repeat_interleave(2, dim=0).flatten(0, 1)
    whole.load_state_dict(state)
    torch.testing.assert_close(grouped(draw_tokens()), whole(draw_tokens()))


def test_gradcheck_of_the_rotation():
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rotation = rotary_table(5, 8, 100.0, like=x)
    assert torch.autograd.gradcheck(lambda x: rotate(x, rotation), (x,))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradcheck_of_a_layer(family):
    config = ModelConfig(family=family, layers=1, dim=8, heads=2, kv_heads=1, ffn_dim=6)
    torch.manual_seed(0)
    layer = Transformer(config, vocab_size=5).double().layers[0]
    x = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    rotation = rotary_table(4, 4, 100.0, like=x) if family == "llama" else None
    assert torch.autograd.gradcheck(lambda x, *_: layer(x, rotation), (x, *layer.parameters()))


@given(first=st.integers(0, 300), distance=st.integers(0, 300), shift=st.integers(0, 300))
@settings(deadline=None, max_examples=50)
def test_rotated_products_depend_on_the_distance_alone(first, distance, shift):
    generator = torch.Generator().manual_seed(first)
    q, k = torch.randn(2, 1, 901, 1, 16, dtype=torch.float64, generator=generator)
    q, k = q[:, :1].expand_as(q), k[:, :1].expand_as(k)  # the same vectors at every position
    rotation = rotary_table(901, 16, 10_000.0, like=q)
    q, k = rotate(q, rotation)[0, :, 0], rotate(k, rotation)[0, :, 0]
    here = q[first] @ k[first + distance]
    there = q[first + shift] @ k[first + shift + distance]
    torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(q[first].norm(), q[0].norm())


def test_angles_keep_their_precision_in_half_precision():
    exact = rotary_table(4096, 64, 10_000.0, like=torch.empty(0, dtype=torch.float64))
    half = rotary_table(4096, 64, 10_000.0, like=torch.empty(0, dtype=torch.bfloat16))
    for one, other in zip(exact, half, strict=True):
        assert other.dtype == torch.float32
        assert torch.equal(one.float(), other)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("autocast", [False, True])
def test_activation_checkpointing_changes_no_bit(shape, autocast):
    gradients = []
    for keep_all in (True, False):
        model = build(shape, dtype=torch.float32)
        model.checkpoint_activations = not keep_all
        fired: list[str] = []
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name, fired=fired: fired.append(name))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = model.loss(draw_tokens())
        loss.backward()
        assert sorted(fired) == sorted(name for name, _ in model.named_parameters())
        gradients.append([loss, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_loss_is_one_graph(shape, checkpointed):
    """What torch.compile cannot follow costs a break there, and speed; fullgraph makes it an error."""
    model, tokens = build(shape, dtype=torch.float32), draw_tokens()
    model.checkpoint_activations = checkpointed
    torch.compiler.reset()  # of the other shapes, of which there may be only so many
    compiled, count = torch.compile(model.loss, backend="eager", fullgraph=True)(tokens)
    assert count == 22
    torch.testing.assert_close(compiled, model.loss(tokens)[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_half_precision_is_near(shape):
    model, tokens = build(shape, dtype=torch.float32), draw_tokens()
    exact, count = model.loss(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        near, _ = model.loss(tokens)
    assert near.dtype == torch.float32
    assert model.bfloat16().loss(tokens)[0].dtype == torch.float32
    assert abs(near.item() - exact.item()) / count < 0.05


def test_an_untrained_model_knows_nothing():
    model = Transformer(ModelConfig(dim=64), vocab_size=1000)
    initialise(model, 0)
    loss, count = model.loss(torch.randint(1000, (4, 65), generator=torch.Generator().manual_seed(0)))
    assert loss.item() / count == pytest.approx(math.log(1000), rel=0.01)


def test_a_sequence_that_is_too_long_is_refused():
    model = build()
    model(draw_tokens(length=16))
    with pytest.raises(ConfigError, match=r"17 tokens is longer than --model\.max-seq-len 16"):
        model(draw_tokens(length=17))


@pytest.mark.parametrize("shape", SHAPES)
def test_counts(shape):
    model = build(shape)
    assert model.num_parameters() == sum(p.numel() for p in set(model.parameters()))
    # Every matrix product of a forward pass, counted by torch itself: twice that again backward.
    with (
        FlopCounterMode(display=False) as counter,
        nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH),
    ):
        model(draw_tokens(batch=1, length=16))
    elementwise = sum(p.numel() for p in model.parameters() if p.dim() == 1)  # norms and biases, also counted at 6
    assert model.flops_per_token(16) == 3 * counter.get_total_flops() / 16 + 6 * elementwise


def test_a_tied_head_is_the_embedding():
    model = build("gpt2")
    model.loss(draw_tokens())[0].backward()
    expected = build("gpt2-untied")
    expected.load_state_dict({**model.state_dict(), "head.weight": model.embedding.weight})
    expected.loss(draw_tokens())[0].backward()
    torch.testing.assert_close(model.embedding.weight.grad, expected.embedding.weight.grad + expected.head.weight.grad)


def test_attention_reads_its_whole_input():
    attention = Attention(ModelConfig(dim=16, heads=4)).double()
    x = torch.randn(1, 6, 16, dtype=torch.float64, requires_grad=True)
    attention(x, rotary_table(6, 4, 10.0, like=x))[0, -1].sum().backward()
    assert x.grad is not None
    assert torch.count_nonzero(x.grad) == x.numel()


def test_it_learns():
    model = build(dtype=torch.float32)
    initialise(model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = draw_tokens(batch=4, length=16)
    for _ in range(40):
        optimizer.zero_grad()
        loss, count = model.loss(tokens)
        (loss / count).backward()
        optimizer.step()
    assert loss.item() / count < 0.3
    assert F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()) < 0.3
