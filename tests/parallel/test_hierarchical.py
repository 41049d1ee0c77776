"""All-reduce in two storeys, between hosts that are none: ranks are told that others are on another host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from mpipar.comm import Communicator
from mpipar.comm.arena import Arena, arena_bytes
from mpipar.comm.buffers import Op
from mpipar.parallel import DataParallel

CPU = torch.device("cpu")
SIZES = [0, 1, 2, 3, 5, 7, 1023, 4099, 300_001]
LAYOUTS = {2: ["ab"], 4: ["aabb", "abab", "aaab", "abcc", "abba"]}


@pytest.fixture(params=["ab", "aabb", "abab", "aaab", "abcc", "abba"])
def hosts(comm: Communicator, request: pytest.FixtureRequest) -> Iterator[Communicator]:
    """The ranks of the job, as if they were on hosts a, b, c."""
    layout: str = request.param
    if layout not in LAYOUTS.get(comm.size, []):
        pytest.skip(f"for {len(layout)} ranks")
    roster = replace(comm.roster, hosts=tuple(map(ord, layout)))
    hosts = Communicator(comm.mpi.Dup(), "hosts", comm.progress, roster)
    yield hosts
    hosts.free()


def given(rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return ((torch.arange(size) * (rank + 3) + 5 * rank) % 13).to(dtype)


@pytest.mark.parametrize("op", ["sum", "mean", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_all_reduce(hosts: Communicator, dtype: torch.dtype, op: Op) -> None:
    if op == "mean" and not dtype.is_floating_point:
        return
    arena = hosts.open_arena(arena_bytes([size * dtype.itemsize for size in SIZES]))
    if isinstance(arena, str):
        assert arena == "each host has one rank"
        pytest.skip(arena)
    for size in SIZES:
        x = arena.allocate(size, dtype, CPU)
        x.copy_(given(hosts.rank, size, dtype))
        hosts.all_reduce(x, op, "hierarchical")
        every = torch.stack([given(rank, size, dtype) for rank in range(hosts.size)]).double()
        expected = {"sum": every.sum(0), "mean": every.mean(0), "max": every.amax(0) if size else every[0]}[op]
        assert torch.equal(x.double(), expected), f"{size} elements"


def test_each_byte_crosses_between_hosts_the_least_possible_times(hosts: Communicator) -> None:
    size, h = 5040, hosts.topology.num_hosts
    arena = hosts.open_arena(4 * size)
    if isinstance(arena, str):
        pytest.skip(arena)
    x = arena.allocate(size, torch.float32, CPU)
    before = hosts.bytes_sent
    hosts.all_reduce(x, algorithm="hierarchical")
    sent = hosts.all_gather_object(hosts.bytes_sent - before)
    for ranks in hosts.topology.hosts:
        assert sum(sent[rank] for rank in ranks) == 2 * (h - 1) * size * 4 // h


def test_the_same_bits_on_all_ranks(hosts: Communicator) -> None:
    arena = hosts.open_arena(1 << 20)
    if isinstance(arena, str):
        pytest.skip(arena)
    x = arena.allocate(100_001, torch.float32, CPU)
    torch.randn(x.shape, generator=torch.Generator().manual_seed(hosts.rank), out=x)
    hosts.all_reduce(x, algorithm="hierarchical")
    assert len({bits.tobytes() for bits in hosts.all_gather_object(x.numpy())}) == 1


def test_the_others_go_round_a_ring_ordered_by_host(hosts: Communicator) -> None:
    for size in (1, 7, 4099):
        total = torch.stack([given(rank, size, torch.float32) for rank in range(hosts.size)]).sum(0)
        x = given(hosts.rank, size, torch.float32)
        hosts.reduce_scatter(x)
        mine = hosts.chunk(size)
        assert torch.equal(x[mine], total[mine])
        assert torch.equal(hosts.all_gather(x), total)
        for algorithm in ("ring", "mpi", "auto"):
            x = given(hosts.rank, size, torch.float32)
            assert torch.equal(hosts.all_reduce(x, algorithm=algorithm), total)
        for root in range(hosts.size):
            x = given(hosts.rank, size, torch.float32)
            assert torch.equal(hosts.broadcast(x, root), given(root, size, torch.float32))
    hosts.barrier()


def test_an_array_outside_and_many_at_once(hosts: Communicator) -> None:
    arena = hosts.open_arena(1 << 20)
    arrays = [torch.full((n,), hosts.rank + 1.0) for n in (1, 50_000)]
    if isinstance(arena, Arena):
        arrays += [arena.allocate(n, torch.float32, CPU).fill_(hosts.rank + 1.0) for n in (3, 100_000)]
    works = [hosts.start_all_reduce(x) for x in arrays]
    for work in reversed(works):
        work.wait()
    assert all((x == hosts.size * (hosts.size + 1) / 2).all() for x in arrays)


def test_gradients_of_replicas_on_several_hosts(hosts: Communicator) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(40, 300), nn.Tanh(), nn.Linear(300, 10)).double()
    alone = nn.Sequential(nn.Linear(40, 300), nn.Tanh(), nn.Linear(300, 10)).double()
    replicas = DataParallel(model, hosts, bucket_bytes=20_000)
    alone.load_state_dict(model.state_dict())
    x = torch.randn(hosts.size, 5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with replicas.final_backward():
        model(x[hosts.rank]).square().sum().backward()
    replicas.reduce(np.zeros(0))
    alone(x.flatten(0, 1)).square().sum().backward()
    for mine, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    replicas.close()
