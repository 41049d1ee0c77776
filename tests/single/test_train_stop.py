"""A request to stop is kept, and told of at once."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from mpipar.train.stop import StopRequest


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield StopRequest()
    for number, handler in before.items():
        signal.signal(number, handler)


def compute() -> float:
    """About a second in which the main thread comes to no handler of Python's; returns its end."""
    rounds, taken_s = 100_000, 0.0
    while taken_s < 0.4:
        rounds *= 2
        began = time.monotonic()
        hashlib.pbkdf2_hmac("sha256", b"", b"", rounds)
        taken_s = time.monotonic() - began
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", rounds)
    return time.monotonic()


def test_it_is_told_while_the_main_thread_computes(stop: StopRequest) -> None:
    told: list[tuple[signal.Signals, float]] = []
    with stop.told(lambda number: told.append((number, time.monotonic()))):
        end = compute()
    assert stop.asked
    ((number, moment),) = told
    assert number == signal.SIGTERM and moment < end - 0.1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_is_kept_where_nobody_is_told(stop: StopRequest, number: signal.Signals) -> None:
    assert not stop.asked
    os.kill(os.getpid(), number)
    assert stop.asked


def test_a_terminal_that_is_gone_ends_nothing(stop: StopRequest) -> None:
    """Each of several signals is told, also after one that nobody could be told of; afterwards nothing is left."""
    told: list[signal.Signals] = []

    def tell(number: signal.Signals) -> None:
        told.append(number)
        raise BrokenPipeError

    threads = threading.active_count()
    with stop.told(tell):
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
    assert told == [signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM]
    assert threading.active_count() == threads and signal.set_wakeup_fd(-1) == -1
