"""Who computes which microbatch: all of them, each once, whoever is alive."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpipar.comm.counter import Counter
from mpipar.train.dealing import Dealing, Team, apportion


def counter() -> Counter:
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, Counter.NUM_BYTES)
    return Counter(descriptor)


def layouts() -> st.SearchStrategy[tuple[tuple[int, ...], ...]]:
    """Ranks by host: uneven, and in any order."""

    def deal(hosts: list[int]) -> tuple[tuple[int, ...], ...]:
        numbered = dict.fromkeys(hosts)
        return tuple(tuple(rank for rank, host in enumerate(hosts) if host == number) for number in numbered)

    return st.lists(st.integers(0, 3), min_size=1, max_size=9).map(deal)


@given(
    hosts=layouts(),
    count=st.integers(1, 40),
    spares=st.integers(0, 3),
    claimed=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_every_microbatch_is_computed_once(
    hosts: tuple[tuple[int, ...], ...], count: int, spares: int, claimed: bool, seed: int
) -> None:
    """Step after step, ranks asking in any order, hosts of any speed."""
    size = sum(map(len, hosts))
    counters = [counter() if claimed else None for _ in hosts]
    dealings = []
    for rank in range(size):
        team = Team(rank, hosts, max(1, size - spares))
        dealings.append(Dealing(team, count, counters[team.host]))
    rng = random.Random(seed)
    for _ in range(4):
        firsts = [list(dealing.first) for dealing in dealings]
        asking: dict[int, Iterator[int]] = {rank: dealing.begin() for rank, dealing in enumerate(dealings)}
        taken: dict[int, list[int]] = {rank: [] for rank in asking}
        while asking:
            rank = rng.choice(list(asking))
            index = next(asking[rank], None)
            if index is None:
                del asking[rank]
            else:
                taken[rank].append(index)
        assert sorted(index for indices in taken.values() for index in indices) == list(range(count))
        assert all(not indices for rank, indices in taken.items() if rank >= max(1, size - spares))
        assert all(indices[:1] == first[:1] for indices, first in zip(taken.values(), firsts, strict=True))
        counts = [float(len(taken[rank])) for rank in range(size)]
        seconds = [n * rng.uniform(0.1, 10.0) for n in counts]
        for dealing in dealings:
            dealing.learn(counts, seconds)


def test_a_slow_host_gets_less() -> None:
    hosts = ((0, 1), (2, 3))
    dealing = Dealing(Team(0, hosts, 4), 12, counter())
    assert len(dealing._share()) == 6
    for _ in range(10):
        dealing.begin()
        dealing.learn([3, 3, 3, 3], [1, 1, 3, 3])
    assert len(dealing._share()) == 9


@given(count=st.integers(0, 1000), weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=20))
def test_shares_are_whole_and_fair(count: int, weights: list[float]) -> None:
    sizes = apportion(count, weights)
    assert sum(sizes) == count
    assert all(abs(size - count * weight / sum(weights)) < 1 for size, weight in zip(sizes, weights, strict=True))


def test_a_counter_outlives_who_holds_it() -> None:
    """A process dies with the lock; the others go on counting, and no number is given twice."""
    shared = counter()
    assert [shared.claim(1), shared.claim(1)] == [0, 1]
    child = os.fork()
    if child == 0:
        import fcntl

        fcntl.lockf(shared._descriptor, fcntl.LOCK_EX)
        os._exit(0)
    os.waitpid(child, 0)
    assert [shared.claim(1), shared.claim(2), shared.claim(2)] == [2, 0, 1]


@pytest.mark.parametrize("processes", [4])
def test_processes_never_get_the_same_number(processes: int) -> None:
    shared, each = counter(), 500
    pipes = []
    for _ in range(processes):
        reading, writing = os.pipe()
        if os.fork() == 0:
            claimed = ",".join(str(shared.claim(1)) for _ in range(each))
            os.write(writing, claimed.encode())
            os._exit(0)
        os.close(writing)
        pipes.append(reading)
    numbers = []
    for reading in pipes:
        with os.fdopen(reading) as stream:
            numbers += [int(text) for text in stream.read().split(",")]
        os.wait()
    assert sorted(numbers) == list(range(processes * each))
