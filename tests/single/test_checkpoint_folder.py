"""Checkpoints on the disk: what is saved is what is loaded, the last good one survives whatever happens."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpipar.checkpoint import discard_after, latest, load, save
from mpipar.errors import CheckpointError
from tests.single.crash_points import crash_everywhere, run_as_program

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def write(root, step, tensors=None, *, keep=2, **attributes):
    tensors = {"weights/x": torch.full((3, 2), float(step))} if tensors is None else tensors
    return save(root, step, tensors, attributes, files={"config.toml": f"step = {step}\n"}, keep=keep)


def listed(root):
    return sorted(path.name for path in root.iterdir())


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_saved_is_loaded(tmp_path, data):
    shapes = st.lists(st.integers(0, 4), max_size=3)
    kinds = data.draw(st.lists(st.tuples(st.sampled_from(DTYPES), shapes), max_size=6))
    attributes = data.draw(st.dictionaries(st.text(), st.none() | st.integers() | st.lists(st.text()), max_size=4))
    tensors = {}
    for number, (dtype, shape) in enumerate(kinds):
        raw = torch.randint(0, 2 if dtype == torch.bool else 100, shape)
        tensors[f"weights/layers.{number}.weight"] = (raw / 7).to(dtype) if dtype.is_floating_point else raw.to(dtype)
    step = data.draw(st.integers(0, 10**9))
    path = save(tmp_path, step, tensors, attributes, files={}, keep=1)
    with load(path) as checkpoint:
        assert checkpoint.step == step
        assert checkpoint.attributes == attributes
        assert set(checkpoint) == set(tensors)
        assert len(checkpoint) == len(tensors)
        for name, tensor in tensors.items():
            assert name in checkpoint
            assert checkpoint.describe(name) == (tensor.shape, tensor.dtype)
            assert checkpoint[name].dtype == tensor.dtype
            assert torch.equal(checkpoint[name], tensor)
    discard_after(tmp_path, -1)


def test_every_bit_of_half_precision_is_kept(tmp_path):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)  # among them infinities and every NaN
    with load(write(tmp_path, 1, {"x": bits.view(torch.bfloat16), "y": bits.view(torch.float16)})) as checkpoint:
        assert torch.equal(checkpoint["x"].view(torch.int16), bits)
        assert torch.equal(checkpoint["y"].view(torch.int16), bits)


def test_views_and_scalars(tmp_path):
    x = torch.arange(12.0).reshape(3, 4)
    with load(write(tmp_path, 1, {"t": x.T, "s": torch.tensor(2.5), "h": torch.tensor(2.5).bfloat16()})) as checkpoint:
        assert torch.equal(checkpoint["t"], x.T)
        assert checkpoint["s"].shape == checkpoint["h"].shape == ()
        assert checkpoint["h"].item() == 2.5


def test_files_lie_beside_the_tensors(tmp_path):
    path = write(tmp_path / "run" / "checkpoints", 200)
    assert path == tmp_path / "run" / "checkpoints" / "step-00000200"
    assert (path / "config.toml").read_text() == "step = 200\n"
    assert listed(path) == ["config.toml", "index.json", "state-0.h5"]


def test_the_latest_are_kept(tmp_path):
    assert latest(tmp_path / "nothing") is None
    assert latest(tmp_path) is None
    (tmp_path / "step-x").mkdir()
    for step in (5, 10, 15, 123_456_789):
        assert latest(tmp_path) != write(tmp_path, step)
        assert latest(tmp_path) == tmp_path / f"step-{step:08d}"
    assert listed(tmp_path) == ["step-00000015", "step-123456789", "step-x"]
    write(tmp_path, 123_456_790, keep=1)
    assert listed(tmp_path) == ["step-123456790", "step-x"]


def test_going_back(tmp_path):
    for step in (5, 10, 15, 20):
        write(tmp_path, step, keep=9)
    write(tmp_path, 12, keep=2)
    assert listed(tmp_path) == [f"step-000000{step}" for step in (10, 12, 15, 20)]
    discard_after(tmp_path, 12)
    assert latest(tmp_path) == tmp_path / "step-00000012"


def test_a_step_is_saved_again(tmp_path):
    write(tmp_path, 5, {"x": torch.zeros(3)})
    with load(write(tmp_path, 5, {"y": torch.ones(3)})) as checkpoint:
        assert set(checkpoint) == {"y"}
    assert listed(tmp_path) == ["step-00000005"]


def test_what_killed_writers_left_is_cleared(tmp_path):
    (tmp_path / ".partial-01234567-step-00000004").mkdir()
    write(tmp_path, 5)
    assert listed(tmp_path) == ["step-00000005"]


def damage(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.write_bytes(content)


def test_damage_is_an_error_that_says_what_to_do(tmp_path):
    write(tmp_path, 5)
    path = write(tmp_path, 10, {"weights/x": torch.ones(100_000)})
    state = path / "state-0.h5"
    size = state.stat().st_size
    damage(state, size // 2)
    with (
        load(path) as checkpoint,
        pytest.raises(CheckpointError, match=r"weights/x.*damaged in block 0.*go on from step 5, remove .*00010"),
    ):
        checkpoint["weights/x"]
    damage(state, 700)
    with load(path) as checkpoint, pytest.raises(CheckpointError, match="damaged header"):
        checkpoint["weights/x"]
    os.truncate(state, size // 2)
    with load(path) as checkpoint, pytest.raises(CheckpointError, match="bytes long"):
        checkpoint["weights/x"]
    state.unlink()
    with load(path) as checkpoint, pytest.raises(CheckpointError, match=r"state-0\.h5: cannot be opened"):
        checkpoint["weights/x"]
    damage(path / "index.json", 200)
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        load(path)
    (path / "index.json").unlink()
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: it has no index\.json"):
        load(path)
    (path / "state.h5").touch()
    with pytest.raises(CheckpointError, match="of version 1"):
        load(path)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load(tmp_path / "nothing")


def test_a_full_disk_leaves_the_earlier_ones(tmp_path):
    good = write(tmp_path, 5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match="step-00000010 cannot be written: File too large"):
            write(tmp_path, 10, {"x": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert listed(tmp_path) == ["step-00000005"]
    with load(good) as checkpoint:
        assert torch.equal(checkpoint["weights/x"], torch.full((3, 2), 5.0))


def test_a_root_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write(tmp_path / "file", 5)


def test_a_kill_at_any_call_leaves_only_whole_checkpoints(tmp_path):
    assert run_as_program("tests.single.test_checkpoint_folder", str(tmp_path)) > 20


def main(folder: Path) -> None:
    tensors = [{"weights/x": torch.full((300, 1000), float(step))} for step in range(4)]
    for step in (1, 2):
        write(folder, step, tensors[step])

    def check() -> None:
        path = latest(folder)
        assert path is not None
        steps = [int(entry.name[5:]) for entry in folder.iterdir() if entry.name.startswith("step-")]
        # Step 3 was committed before step 1, and nothing else, was given up for it.
        assert sorted(steps) in ([1, 2], [1, 2, 3], [2, 3]), steps
        for step in steps:
            with load(folder / f"step-{step:08d}") as checkpoint:
                assert checkpoint.step == step
                assert torch.equal(checkpoint["weights/x"], tensors[step]["weights/x"])
        if 3 in steps:  # back to where every child begins
            discard_after(folder, 2)
            write(folder, 1, tensors[1])

    print(crash_everywhere(lambda: write(folder, 3, tensors[3]), check))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
