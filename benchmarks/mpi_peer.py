"""MPI itself, called through mpi4py: the peer. What it waits like, and messages as it takes them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mpipar.comm import Communicator, mpi_version
from mpipar.comm.mpi import MPI

Message = list[Any]
"""[memory, MPI datatype], as mpi4py takes them."""

Calls = dict[str, Callable[[], object]]
"""What can be timed, by name."""

_YIELDS = "OMPI_MCA_mpi_yield_when_idle"

_TYPES = {
    torch.float32: MPI.FLOAT,
    torch.float64: MPI.DOUBLE,
    torch.int32: MPI.INT32_T,
    torch.int64: MPI.INT64_T,
}


def title(function: str) -> str:
    """Such as "MPI_Allreduce, Open MPI v5.0.11, yields when idle"."""
    return ", ".join(part for part in (f"MPI_{function}", mpi_version(), waiting()) if part)


def waiting() -> str:
    """What a rank does that waits for a message, where the library lets one choose; "" where it does not."""
    if "Open MPI" not in mpi_version():
        return ""
    yields = os.environ.get(_YIELDS, "0").lower() in ("1", "true", "yes", "on")
    return "yields when idle" if yields else "spins when idle"


def reducible(x: Tensor) -> Message | None:
    """The array as MPI can add it up; None where MPI has no such numbers. On a GPU a copy, which is not timed."""
    return [x.cpu().numpy(), _TYPES[x.dtype]] if x.dtype in _TYPES else None


def cannot_add(dtype: torch.dtype) -> str:
    """Why `reducible` is None."""
    return f"MPI adds up no {str(dtype).removeprefix('torch.')}"


def movable(x: Tensor) -> Message:
    """The array as MPI can move it: bytes. On a GPU a copy, which is not timed."""
    return [x.cpu().view(torch.uint8).numpy(), MPI.BYTE]


def calls(world: Communicator, function: str, *arguments: Any) -> Calls:
    """A collective function of MPI, by its name in mpi4py, and what starts it and then waits for it."""
    run, start = getattr(MPI.COMM_WORLD, function), getattr(MPI.COMM_WORLD, f"I{function.lower()}")
    return {
        **blocking(world, {function: lambda: run(*arguments)}),
        f"I{function.lower()}": lambda: start(*arguments).Wait(),
    }


def blocking(world: Communicator, given: Calls) -> Calls:
    """These calls, or none where they would take minutes.

    In its blocking collectives MPICH spins and never yields. With more ranks than cores whoever has a core then keeps
    it from those that it waits for; in MPI_Wait it yields.
    """
    most_on_a_host = max(len(ranks) for ranks in world.topology.hosts)
    return {} if "MPICH" in mpi_version() and most_on_a_host > (os.cpu_count() or 1) else given
