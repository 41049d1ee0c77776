"""Model and optimizer go on from a checkpoint as if they had never stopped, or not at all."""

from __future__ import annotations

import re

import pytest
import torch

from mpipar.checkpoint import capture, load, restore, save
from mpipar.errors import CheckpointError
from mpipar.model import ModelConfig, Transformer, initialise

SHAPES = {
    "llama": ModelConfig(layers=2, dim=16, heads=4, kv_heads=2),
    "gpt2": ModelConfig(family="gpt2", layers=2, dim=16, heads=2),
}


def build(
    config=SHAPES["llama"], *, seed=0, dtype=torch.float32, fused=True, frozen=()
) -> tuple[Transformer, torch.optim.AdamW]:
    model = Transformer(config, vocab_size=20).to(dtype)
    initialise(model, seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return model, torch.optim.AdamW(groups, lr=1e-2, fused=fused)


def advance(model, optimizer, steps):
    losses = []
    for step in steps:
        tokens = torch.randint(20, (2, 9), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss, _ = model.loss(tokens)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def store(folder, model, optimizer):
    return save(folder, 3, capture(model, optimizer), {}, files={}, keep=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_restored_run_goes_on_to_the_bit(tmp_path, shape, fused, dtype):
    run = build(SHAPES[shape], dtype=dtype, fused=fused)
    advance(*run, range(3))
    path = store(tmp_path, *run)
    resumed = build(SHAPES[shape], seed=1, dtype=dtype, fused=fused)
    advance(*resumed, [7])  # a state of its own, which must leave no trace
    addresses = [parameter.data_ptr() for parameter in resumed[0].parameters()]
    with load(path) as checkpoint:
        restore(*resumed, checkpoint)
    assert [parameter.data_ptr() for parameter in resumed[0].parameters()] == addresses
    saved, loaded = capture(*run), capture(*resumed)
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert advance(*resumed, range(3, 6)) == advance(*run, range(3, 6))


def test_names():
    model, optimizer = build()
    names = {name for name, _ in model.named_parameters()}
    assert set(capture(model, optimizer)) == {f"weights/{name}" for name in names}
    advance(model, optimizer, [0])
    kept = {f"optimizer/{name}/{key}" for name in names for key in ("step", "exp_avg", "exp_avg_sq")}
    assert set(capture(model, optimizer)) == {f"weights/{name}" for name in names} | kept


def test_a_restored_state_is_a_copy():
    run, resumed = build(), build()
    advance(*run, [0])
    captured = capture(*run)
    before = {name: tensor.detach().clone() for name, tensor in captured.items()}
    restore(*resumed, captured)
    advance(*resumed, [1])
    assert all(torch.equal(captured[name], before[name]) for name in before)


def test_the_optimizer_keeps_its_settings(tmp_path):
    run, resumed = build(), build()
    advance(*run, [0])
    resumed[1].param_groups[0]["lr"] = 0.125
    restore(*resumed, capture(*run))
    assert resumed[1].param_groups[0]["lr"] == 0.125


def test_frozen_parameters_have_no_state(tmp_path):
    frozen = ("embedding.weight", "layers.0.attention.wq.weight")
    run, resumed = build(frozen=frozen), build(seed=1, frozen=frozen)
    advance(*run, range(2))
    with load(store(tmp_path, *run)) as checkpoint:
        restore(*resumed, checkpoint)
    assert not any(name.startswith(f"optimizer/{frozen[0]}") for name in capture(*resumed))
    assert advance(*resumed, [2]) == advance(*run, [2])


def test_a_checkpoint_of_the_start(tmp_path):
    run, resumed = build(), build(seed=1)
    path = store(tmp_path, *run)
    advance(*resumed, [0])
    with load(path) as checkpoint:
        restore(*resumed, checkpoint)
    assert advance(*resumed, range(2)) == advance(*run, range(2))


@pytest.mark.parametrize(
    ("config", "dtype", "messages"),
    [
        (
            ModelConfig(layers=3, dim=16, heads=4, kv_heads=2),
            torch.float32,
            ["not in the checkpoint: weights/layers.2.attention_norm.weight, ", " and 6 more"],
        ),
        (
            ModelConfig(layers=1, dim=16, heads=4, kv_heads=2),
            torch.float32,
            ["not in the model: weights/layers.1.attention.wk.weight, ", " and 33 more"],
        ),
        (
            ModelConfig(layers=2, dim=16, heads=4),
            torch.float32,
            ["of another shape or dtype", "weights/layers.0.attention.wk.weight (float32 8x16, in the model float32"],
        ),
        (SHAPES["gpt2"], torch.float32, ["not in the checkpoint: weights/positions.weight", "not in the model"]),
        (SHAPES["llama"], torch.float64, ["weights/embedding.weight (float32 20x16, in the model float64 20x16)"]),
    ],
)
def test_another_model_is_refused_and_left_alone(tmp_path, config, dtype, messages):
    run = build()
    advance(*run, [0])
    path = store(tmp_path, *run)
    other = build(config, dtype=dtype)
    advance(*other, [0])
    before = {name: tensor.detach().clone() for name, tensor in capture(*other).items()}
    with load(path) as checkpoint, pytest.raises(CheckpointError) as caught:
        restore(*other, checkpoint, source=f"checkpoint {path}")
    assert str(caught.value).startswith(f"checkpoint {path} is of another model, of {run[0].num_parameters():,} parame")
    for message in messages:
        assert re.search(re.escape(message), str(caught.value)), str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in capture(*other).items())


def test_damage_is_found_before_anything_is_changed(tmp_path):
    run, other = build(), build(seed=1)
    path = store(tmp_path, *run)
    content = bytearray((path / "state-0.h5").read_bytes())
    with load(path) as checkpoint:
        last = checkpoint["weights/norm.weight"].numpy().tobytes()
    content[content.rindex(last)] ^= 1
    (path / "state-0.h5").write_bytes(content)
    before = {name: tensor.detach().clone() for name, tensor in capture(*other).items()}
    with load(path) as checkpoint, pytest.raises(CheckpointError, match="damaged in block 0"):
        restore(*other, checkpoint)
    assert all(torch.equal(tensor, before[name]) for name, tensor in capture(*other).items())
