"""How often the host looks at what a step computes: each time it would have to wait for a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mpipar.comm import Communicator
from mpipar.train.metrics import Totals
from tests.parallel.small_data import small_step

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


def test_the_number_of_microbatches_does_not_enter(comm: Communicator, shared_path: Path, lists: list[Tensor]) -> None:
    found = []
    for microbatch in (1, 2):  # 8 in a step, and 4
        step, source = small_step(comm, shared_path, reproducible=False, microbatch=microbatch)
        with Reads() as reads:
            lists.clear()
            step.compute(0, source, stop=False)
        found.append((reads.count, len(lists)))
        source.close()
        step.replicas.close()
    assert found[0] == found[1]
    assert found[0][1] == 2, "losses and counts together, and the norms of the gradient's blocks"


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
