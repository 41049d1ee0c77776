"""Checkpoints of a job: written together in the background, read together; what fails on one rank fails on all."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mpipar.checkpoint import latest, load
from mpipar.checkpoint.snapshot import Snapshot
from mpipar.checkpoint.write import Notes, Share
from mpipar.comm import Communicator
from mpipar.train import resume
from mpipar.train.saver import Ending, Saver

STEP = 12


def state(seed: int = 1) -> dict[str, Tensor]:
    """Small and large tensors, of several dtypes."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"weights/{i}": torch.randn(600, 500, generator=generator) for i in range(5)}
    tensors |= {f"optimizer/{i}/step": torch.tensor(float(seed)) for i in range(5)}
    tensors["weights/half"] = torch.randn(999, generator=generator).bfloat16()
    tensors["weights/turned"] = torch.randn(30, 700, generator=generator).T
    tensors["weights/none"] = torch.empty(0, 3)
    return tensors


def notes(step: int = STEP) -> Notes:
    return Notes(step, {"seen": step}, {"config.toml": f"step = {step}\n"}, keep=2)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_gpu_is_waited_for_where_one_can_give_up(
    comm: Communicator, shared_path: Path, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is copied from it; then the copy itself takes as long as it does."""
    done: list[str] = []

    def noting(what: str, action: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*its: Any) -> Any:
            done.append(what)
            return action(*its)

        return noted

    monkeypatch.setattr(Communicator, "catch_up", noting("caught up", Communicator.catch_up))
    monkeypatch.setattr(Snapshot, "take", noting("copied", Snapshot.take))
    monkeypatch.setattr(Share, "write", noting("written", Share.write))
    saver = Saver(shared_path, comm, asynchronous=asynchronous)
    saver.begin(notes(), state())
    saver.settle(wait=True)
    assert done == ["caught up", *(["copied"] if asynchronous else []), "written"]


def left_over(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if not path.name.startswith("step-"))


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("alone", [False, True], ids=["one host", "each on a host of its own"])
def test_what_is_written_together_is_read_together(
    comm: Communicator, shared_path: Path, asynchronous: bool, alone: bool
) -> None:
    if alone:
        comm.roster = replace(comm.roster, hosts=tuple(range(comm.size)))
    saver = Saver(shared_path, comm, asynchronous=asynchronous)
    for step in (STEP, STEP + 1):  # the second in the memory of the first
        tensors = state(step)
        ending = saver.begin(notes(step), tensors)
        if asynchronous:
            assert ending is None and saver.pending
            for tensor in tensors.values():
                tensor.zero_()  # the run goes on
            while ending is None:
                ending = saver.settle(wait=step > STEP)
        assert ending == Ending(step) and not saver.pending
        path = latest(shared_path)
        assert path is not None and path.name == f"step-{step:08d}"
        with load(path) as found:
            found.verify()
        assert len(list(path.glob("*.h5"))) == (comm.size if alone else 1)
        read, done, attributes = resume.read(path, comm)
        assert (done, attributes) == (step, {"seen": step})
        for name, expected in state(step).items():
            assert read[name].dtype == expected.dtype and torch.equal(read[name], expected), name
        comm.barrier()
    assert left_over(shared_path) == []


def test_ranks_that_do_not_see_the_folder_get_what_the_others_read(
    comm: Communicator, shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hosts without a common file system: rank 0's writes and reads."""
    if comm.rank > 0:
        monkeypatch.setattr(Path, "is_dir", lambda path: False)
    saver = Saver(shared_path, comm, asynchronous=True)
    assert saver.begin(notes(), state()) is None
    assert saver.settle(wait=True) == Ending(STEP)
    read, done, _ = resume.read(shared_path / f"step-{STEP:08d}", comm)
    assert done == STEP and all(torch.equal(read[name], x) for name, x in state().items())


@pytest.mark.parametrize("phase", ["write", "seal", "publish"])
def test_what_one_disk_refuses_is_everybodys_failure(
    comm: Communicator, shared_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    guilty = comm.size - 1 if phase == "write" else 0

    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    saver = Saver(shared_path, comm, asynchronous=True)
    assert saver.begin(notes(STEP - 1), state()) or saver.settle(wait=True) == Ending(STEP - 1)
    comm.barrier()
    if comm.rank == guilty:
        monkeypatch.setattr(Share, phase, refuse)
    assert saver.begin(notes(), state()) is None
    ending = saver.settle(wait=True)
    assert ending is not None and "step-00000012 cannot be written: No space left on device" in str(ending.failure)
    if comm.size > 1:
        assert str(ending.failure).endswith(f"Earlier checkpoints are as they were (rank {guilty})")
    comm.barrier()
    assert not saver.pending and left_over(shared_path) == []
    found = latest(shared_path)
    assert found is not None and found.name == f"step-{STEP - 1:08d}"
    monkeypatch.undo()
    comm.barrier()
    assert saver.begin(notes(), state()) is None
    assert saver.settle(wait=True) == Ending(STEP), "the next try"


def test_what_is_abandoned_leaves_nothing(
    comm: Communicator, shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a rank dies: the others' threads are in the middle of it."""
    gate = threading.Event()
    write = Share.write

    def slow(self: Share, *arguments: object) -> object:
        assert gate.wait(20)
        return write(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Share, "write", slow)
    saver = Saver(shared_path, comm, asynchronous=True)
    assert saver.begin(notes(), state()) is None
    assert saver.settle(wait=False) is None and saver.pending
    threading.Timer(0.2, gate.set).start()
    assert saver.abandon() and not saver.pending
    comm.barrier()
    assert list(shared_path.iterdir()) == []
    assert not saver.abandon()
    assert saver.begin(notes(), state()) is None
    assert saver.settle(wait=True) == Ending(STEP)


def test_a_bug_in_the_thread_is_raised_in_the_run(
    world: Communicator, shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if world.size > 1:
        pytest.skip("it ends a job of several")

    def broken(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Share, "write", broken)
    saver = Saver(shared_path, world, asynchronous=True)
    assert saver.begin(notes(), state()) is None
    with pytest.raises(ZeroDivisionError):
        saver.settle(wait=True)
