"""Who is ended by the watchdog: a rank that hangs. And who is not: one that works, waits, or is suspended with all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mpipar.comm import watchdog
from mpipar.comm.watchdog import Pulse, Watch

TIMEOUT_S = 1.0  # on a busy machine a rank that works may not run for half of that
LIMIT_S = 30.0

# The module stands on its own, so a rank needs neither torch nor MPI. It does not outlive a test that was killed.
RANK = """
import runpy, sys, time
path, descriptor, rank, timeout_s, role = sys.argv[1:]
watch = runpy.run_path(path)["Watch"](int(descriptor))
pulse = watch.pulse(int(rank))
if rank == "0":
    watch.start(float(timeout_s))
print("here", flush=True)
if role == "waits":
    with pulse.silent():
        time.sleep(60)
for _ in range(3000):
    if role == "works":
        pulse.beat()
    time.sleep(0.02)
"""

Start = Callable[..., list[subprocess.Popen[str]]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts ranks of these roles, and their watchdog. In the end nothing of them may be left."""
    ranks: list[subprocess.Popen[str]] = []
    watchdogs: list[int] = []

    def start(*roles: str) -> list[subprocess.Popen[str]]:
        descriptor = os.memfd_create("test")
        os.ftruncate(descriptor, Watch.num_bytes(len(roles)))
        for rank, role in enumerate(roles):
            words = [str(watchdog.__file__), str(descriptor), str(rank), str(TIMEOUT_S), role]
            command = [sys.executable, "-I", "-S", "-c", RANK, *words]
            ranks.append(subprocess.Popen(command, pass_fds=[descriptor], stdout=subprocess.PIPE, text=True))
        os.close(descriptor)
        for process in ranks:
            assert process.stdout is not None and process.stdout.readline() == "here\n"
        watchdogs.extend(children(ranks[0].pid))
        assert len(watchdogs) == 1
        return ranks

    yield start
    for process in ranks:
        process.kill()
        process.communicate()
    wait_until(lambda: not any(map(is_alive, watchdogs)))


def children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def is_alive(process: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stay_alive(*ranks: subprocess.Popen[str]) -> None:
    """They do, for several time-outs."""
    time.sleep(3 * TIMEOUT_S)
    assert [rank.poll() for rank in ranks] == [None] * len(ranks)


def test_a_rank_without_a_sign_of_life_is_killed(start: Start) -> None:
    works, hangs, waits = start("works", "hangs", "waits")
    began = time.monotonic()
    assert hangs.wait(LIMIT_S) == -signal.SIGKILL
    assert time.monotonic() - began > TIMEOUT_S / 2
    stay_alive(works, waits)


@pytest.mark.parametrize("role", ["works", "waits"])
def test_a_stopped_rank_is_killed(start: Start, role: str) -> None:
    works, stopped = start("works", role)
    stopped.send_signal(signal.SIGSTOP)
    assert stopped.wait(LIMIT_S) == -signal.SIGKILL
    assert works.poll() is None


def test_a_rank_that_is_stopped_for_a_moment_goes_on(start: Start) -> None:
    works, stopped = start("works", "works")
    for _ in range(6):
        stopped.send_signal(signal.SIGSTOP)
        time.sleep(TIMEOUT_S / 4)
        stopped.send_signal(signal.SIGCONT)
        time.sleep(TIMEOUT_S / 4)
    assert works.poll() is None and stopped.poll() is None


def test_a_suspended_job_goes_on(start: Start) -> None:
    """All ranks are stopped, by somebody who will let them go on."""
    ranks = start("works", "works", "waits")
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in ranks:
            rank.send_signal(number)
        stay_alive(*ranks)


def test_the_watchdog_outlives_who_has_started_it(start: Start) -> None:
    first, works, hangs = start("works", "works", "hangs")
    first.kill()
    assert hangs.wait(LIMIT_S) == -signal.SIGKILL
    assert works.poll() is None


def test_nobody_has_to_watch() -> None:
    pulse = Pulse()
    pulse.beat()
    with pulse.silent():
        pulse.beat()
