"""All-to-all, and shards of uneven sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpipar.comm import Communicator
from mpipar.comm.arena import Arena
from mpipar.errors import MessageError


def part(sender: int, receiver: int, size: int) -> np.ndarray:
    return (np.arange(size) % 13 + 64.0 * sender + 16 * receiver) % 256


@pytest.mark.parametrize("dtype", ["float32", "int64", "uint8", "float16"])
def test_even(comm: Communicator, dtype: str) -> None:
    for size in (0, 1, 5, 70_000):
        out = np.concatenate([part(comm.rank, i, size) for i in range(comm.size)]).astype(dtype)
        into = comm.all_to_all(out, np.zeros_like(out))
        assert (into == np.concatenate([part(i, comm.rank, size) for i in range(comm.size)]).astype(dtype)).all()


def test_bfloat16(comm: Communicator) -> None:
    out = torch.full((comm.size * 3,), float(comm.rank), dtype=torch.bfloat16)
    into = comm.all_to_all(out, torch.zeros_like(out))
    assert torch.equal(into.view(-1, 3)[:, 0].float(), torch.arange(comm.size).float())


def test_uneven(comm: Communicator) -> None:
    def size(sender: int, receiver: int) -> int:
        return (3 * sender + 5 * receiver) % 7 * 11  # zeros among them

    out_sizes = [size(comm.rank, i) for i in range(comm.size)]
    into_sizes = [size(i, comm.rank) for i in range(comm.size)]
    out = np.concatenate([part(comm.rank, i, size(comm.rank, i)) for i in range(comm.size)])
    into = comm.all_to_all(out, np.zeros(sum(into_sizes)), out_sizes, into_sizes)
    assert (into == np.concatenate([part(i, comm.rank, size(i, comm.rank)) for i in range(comm.size)])).all()


def test_parts_that_do_not_match_are_an_error(comm: Communicator) -> None:
    if comm.size != 2:
        pytest.skip("two ranks show it")
    lone = comm.duplicate("lone")
    sizes = [2, 3] if comm.rank == 0 else [2, 4]
    with pytest.raises(MessageError, match=r"rank \d sent (more than )?\d+ bytes where \d+ were expected"):
        lone.all_to_all(np.zeros(5 + comm.rank), np.zeros(5 + comm.rank), sizes, sizes)


def test_what_cannot_be_is_refused(comm: Communicator) -> None:
    x = np.zeros(3 * comm.size)
    with pytest.raises(MessageError, match="one dtype"):
        comm.all_to_all(x, np.zeros(x.size, "float32"))
    with pytest.raises(MessageError, match="give two arrays"):
        comm.all_to_all(x, x)
    with pytest.raises(MessageError, match="do not cut"):
        comm.all_to_all(x, x.copy(), [1] * comm.size, [3] * comm.size)
    with pytest.raises(MessageError, match="do not cut"):
        comm.all_gather(x, [x.size] if comm.size > 1 else [x.size + 1])
    if comm.size > 1:
        with pytest.raises(MessageError, match="equal parts"):
            comm.all_to_all(np.zeros(3 * comm.size + 1), np.zeros(3 * comm.size + 1))


@pytest.mark.parametrize("where", ["arena", "private"])
def test_uneven_shards(comm: Communicator, where: str) -> None:
    none = [0] * (comm.size - 1)
    for sizes in ([7, *none], [*none, 100_001], [3 * i % 5 for i in range(comm.size)]):
        total = sum(sizes)
        arena = comm.open_arena(1 << 20) if where == "arena" else ""
        if where == "arena" and not isinstance(arena, Arena):
            pytest.skip(str(arena))
        x = (
            arena.allocate(total, torch.float32, torch.device("cpu"))
            if isinstance(arena, Arena)
            else torch.zeros(total)
        )
        x.copy_(torch.arange(total) % 11 * (comm.rank + 1))
        comm.reduce_scatter(x, sizes=sizes)
        wanted = torch.arange(total) % 11 * (comm.size * (comm.size + 1) // 2)
        start = sum(sizes[: comm.rank])
        mine = slice(start, start + sizes[comm.rank])
        assert torch.equal(x[mine], wanted[mine].float())
        x[:start] = x[mine.stop :] = -1
        comm.all_gather(x, sizes)
        assert torch.equal(x, wanted.float())
        if isinstance(arena, Arena):
            comm.close_arena(arena)
