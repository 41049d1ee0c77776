"""How often the host looks at what a step computes: each time it would have to wait for a GPU."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mpipar.comm import Communicator, exact
from mpipar.comm.device.runtime import Rounding
from mpipar.model import Transformer, begin_microbatch
from mpipar.parallel import ledger
from mpipar.train import step as step_module
from mpipar.train.metrics import Totals
from tests.parallel.small_data import small_step
from tests.stand_in import arithmetic

# What has a result whose value, or shape, Python needs at once.
READING = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal", "aten::masked_select"}


class Reads(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.count += func._schema.name in READING
        return func(*args, **(kwargs or {}))


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors that are read as lists, which is not dispatched."""
    seen: list[Tensor] = []
    tolist: Callable[[Tensor], Any] = Tensor.tolist

    def counted(self: Tensor) -> Any:
        seen.append(self)
        return tolist(self)

    monkeypatch.setattr(Tensor, "tolist", counted)
    return seen


@pytest.fixture
def unawaited(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors that are read though this rank has not caught up with its device since the last reading."""
    seen: list[Tensor] = []
    caught_up = [False]
    tolist: Callable[[Tensor], Any] = Tensor.tolist
    cpu: Callable[[Tensor], Tensor] = Tensor.cpu
    catch_up = Communicator.catch_up

    def noting(read: Callable[[Tensor], Any], *, ends: bool) -> Callable[[Tensor], Any]:
        def noted(self: Tensor) -> Any:
            if not caught_up[0]:
                seen.append(self)
            caught_up[0] = caught_up[0] and not ends
            return read(self)

        return noted

    def caught(self: Communicator, device: torch.device) -> None:
        caught_up[0] = True
        catch_up(self, device)

    monkeypatch.setattr(Tensor, "tolist", noting(tolist, ends=True))
    monkeypatch.setattr(Tensor, "cpu", noting(cpu, ends=False))  # of all tensors, one after the other
    monkeypatch.setattr(Communicator, "catch_up", caught)
    return seen


def num_lists(comm: Communicator, shared_path: Path, lists: list[Tensor], *, reproducible: bool) -> int:
    """How many tensors a step reads as lists; and whatever it reads, it is as much with 8 microbatches as with 4."""
    found = []
    for microbatch in (1, 2):
        step, source = small_step(comm, shared_path, reproducible=reproducible, microbatch=microbatch)
        with Reads() as reads:
            lists.clear()
            step.compute(0, source, stop=False)
        found.append((reads.count, len(lists)))
        source.close()
        step.replicas.close()
    assert found[0] == found[1]
    return found[0][1]


def test_the_number_of_microbatches_does_not_enter(comm: Communicator, shared_path: Path, lists: list[Tensor]) -> None:
    said = "losses and counts together, and the norms of the gradient's blocks"
    assert num_lists(comm, shared_path, lists, reproducible=False) == 2, said


@pytest.fixture
def as_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contributions are noted as they are on a GPU: nobody is told."""

    def add_rounded(total: Tensor, x: Tensor, spacing: float, largest: Tensor, *, first: bool) -> None:
        dtype = str(x.dtype).removeprefix("torch.")
        addresses = total.data_ptr(), x.data_ptr(), x.numel(), dtype, exact.anchor(spacing), first, largest.data_ptr()
        arithmetic.round_and_add(Rounding(*addresses))

    monkeypatch.setattr(ledger, "is_on_gpu", lambda x: True)
    monkeypatch.setattr(ledger, "add_rounded_on_gpu", add_rounded)


def test_sums_without_rounding_read_no_more(
    comm: Communicator, shared_path: Path, lists: list[Tensor], as_on_gpus: None
) -> None:
    said = "losses, counts and faults together; the largest gradients; the norms"
    assert num_lists(comm, shared_path, lists, reproducible=True) == 3, said


@pytest.mark.parametrize("where", ["on the CPU", "as on GPUs"])
@pytest.mark.parametrize("wrong", [math.inf, 2.0**60])
def test_the_microbatch_at_fault_is_named(
    comm: Communicator,
    shared_path: Path,
    where: str,
    wrong: float,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its loss is a number, and its gradient is infinite, or too large for the grid."""
    if where == "as on GPUs":
        request.getfixturevalue("as_on_gpus")
    step, source = small_step(comm, shared_path, reproducible=True, microbatch=1)
    while True:  # until the grids fit
        step.compute(0, source, stop=False)
        if step.fits():
            break
    step.replicas.start_over()
    now: list[int] = []

    def noting(model: Transformer, seed: int, number: int, index: int) -> None:
        now[:] = [index]
        begin_microbatch(model, seed, number, index)

    monkeypatch.setattr(step_module, "begin_microbatch", noting)
    weight = step.model.get_parameter("layers.0.attention.wq.weight")
    weight.register_hook(lambda gradient: gradient * wrong if now == [5] else gradient)
    computed = step.compute(0, source, stop=False)
    assert computed.totals.faults.nonzero()[0].tolist() == [5]
    assert torch.tensor(computed.totals.losses).isfinite().all()
    source.close()
    step.replicas.close()


def test_an_evaluation_reads_once(comm: Communicator, shared_path: Path, lists: list[Tensor]) -> None:
    step, source = small_step(comm, shared_path, reproducible=False, microbatch=1)
    mine = Totals.none(8, comm.size)
    sequences = [(index, source.microbatch(0, index)) for index in range(8)]
    with Reads() as reads:
        lists.clear()
        step.evaluate(sequences, mine)
    assert (reads.count, len(lists)) == (0, 1)
    assert mine.num_tokens == sum(step.model.loss(*its)[1].item() for _, its in sequences)
    assert (mine.losses > 0).all()
    source.close()
    step.replicas.close()


@pytest.mark.parametrize("reproducible", [False, True])
def test_nothing_is_read_from_a_device_without_a_deadline(
    comm: Communicator,
    shared_path: Path,
    reproducible: bool,
    request: pytest.FixtureRequest,
    lists: list[Tensor],
    unawaited: list[Tensor],
) -> None:
    """Copying to the host waits for the device: before it, every rank has waited where it can give up."""
    if reproducible:
        request.getfixturevalue("as_on_gpus")
    step, source = small_step(comm, shared_path, reproducible=reproducible, microbatch=1)
    lists.clear()
    step.apply(step.compute(0, source, stop=False))
    step.evaluate([(0, source.microbatch(0, 0))], Totals.none(1, comm.size))
    step.digest()
    step.fingerprint(source.microbatch(0, 0))
    assert lists, "they were read"
    assert not unawaited
    source.close()
    step.replicas.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_on_a_gpu_nobody_waits_in_the_microbatch_loop(comm: Communicator, shared_path: Path, precision: Any) -> None:
    """torch itself says where the host waits: once for the losses, whatever the number of microbatches.

    On one rank. Among several the reduction of gradients begins in the last backward, and may wait as it likes.
    """
    if comm.size > 1:
        return
    found = []
    for microbatch in (1, 2):
        step, source = small_step(
            comm, shared_path, reproducible=False, microbatch=microbatch, precision=precision, device="cuda"
        )
        for number in range(2):  # what is only done once has been done
            step.apply(step.compute(number, source, stop=False))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step.apply(step.compute(2, source, stop=False))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found.append(len([warning for warning in said if "called a synchronizing" in str(warning.message)]))
        source.close()
        step.replicas.close()
    assert found[0] == found[1]
