"""Hosts on one machine: they are there, their links are what was asked for, and nothing of them stays.

Then what they are for: jobs between hosts.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks import hosts as hosts_module
from benchmarks.hosts import Hosts, why_not
from tests.jobs.launch import MARK, ROOT, Job, marked, run

REASON = why_not()
REASON_FOR_DELAY = why_not(delay_ms=1)

pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "hosts can be made here")
with_delay = pytest.mark.skipif(REASON_FOR_DELAY is not None, reason=REASON_FOR_DELAY or "delays can be made here")

COMMAND = ("-m", "benchmarks.hosts", "--timeout-s", "45")
WIRE = [sys.executable, str(ROOT / "tests" / "jobs" / "wire.py")]
ALGORITHMS = ["auto", "ring", "hierarchical", "mpi"]
BETWEEN_HOSTS = [sys.executable, str(ROOT / "tests" / "jobs" / "between_hosts.py"), *ALGORITHMS]

# A rank that says that all are there, and then never ends.
ENDLESS = """
import time
from mpi4py import MPI
MPI.COMM_WORLD.Barrier()
if MPI.COMM_WORLD.rank == 0:
    print("all are there", flush=True)
time.sleep(1000)
"""

# A rank that says where it is and what came to it.
WHO = """
import os, socket
from mpi4py import MPI
host = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
mine = f"{socket.gethostname()}/{host.size}/{os.environ['MPIPAR_TEST']}/{os.environ['EXTRA']}"
everyones = MPI.COMM_WORLD.gather(mine)
if everyones:
    open(os.environ["OUT"], "w").write(" ".join(everyones))
"""


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Job], list[str]]]:
    """left(job): the names of what is still there of a job of benchmarks.hosts: namespaces, files, processes."""
    mark = secrets.token_hex(8)
    monkeypatch.setenv(MARK, mark)  # all processes of the test inherit it, and can be found by it

    def left(job: Job) -> list[str]:
        run = f"mpipar-hosts-{job.process.pid}-*"
        files = [str(path) for folder in ("/run/netns", tempfile.gettempdir()) for path in Path(folder).glob(run)]
        return files + [f"process {pid}" for pid in marked(mark)]

    yield left
    for pid in marked(mark):  # of a test that has failed
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("ranks", "by", "expected"),
    [([3, 1], "slot", "h1/3 h1/3 h1/3 h2/1"), ([2, 2], "node", "h1/2 h2/2 h1/2 h2/2")],
)
def test_ranks_are_on_their_hosts(
    ranks: list[int], by: hosts_module.Order, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And know this process's variables, and those that are given."""
    monkeypatch.setenv("MPIPAR_TEST", "inherited")
    with Hosts(2, rate_mbit=1000) as hosts:
        env = {"EXTRA": "given", "OUT": str(tmp_path / "out")}
        assert hosts.mpirun(ranks, [sys.executable, "-c", WHO], by=by, env=env, timeout_s=45) == 0
    assert (tmp_path / "out").read_text() == " ".join(f"{place}/inherited/given" for place in expected.split())


@pytest.mark.parametrize(
    ("rate_mbit", "delay_ms"),
    [(50, 0), (1000, 0), pytest.param(50, 5, marks=with_delay), pytest.param(500, 1, marks=with_delay)],
)
@pytest.mark.parametrize("senders", [1, 2])
def test_links_are_what_was_asked_for(rate_mbit: float, delay_ms: float, senders: int) -> None:
    """The upload of a single sender, and the download of a host to which two send at once.

    A busy machine can make links slower and delays longer, never the other way: the best counts, of ten if need be.
    """
    found = []
    with Hosts(senders + 1, rate_mbit, delay_ms) as hosts:
        for _ in range(10):
            found.append(measure(hosts, int(rate_mbit * 1e6 / 8 * 0.3 / senders)))
            reached_mbit, round_trip_ms = max(rate for rate, _ in found), min(ping for _, ping in found)
            if reached_mbit > 0.85 * rate_mbit and round_trip_ms < 2 * delay_ms + 1:
                break
    assert abs(reached_mbit / rate_mbit - 1) < 0.15, found
    assert 2 * delay_ms <= round_trip_ms < 2 * delay_ms + 1, found


def measure(hosts: Hosts, num_bytes: int) -> tuple[float, float]:
    """The rate in Mbit/s at which the first host receives, `num_bytes` from each other; a round trip before, in ms."""
    receiver, *senders = hosts.names
    receive = hosts.on(receiver, [*WIRE, "receive", str(len(senders)), str(num_bytes)])
    with subprocess.Popen(receive, stdout=subprocess.PIPE, text=True) as receiving:
        assert receiving.stdout is not None and receiving.stdout.readline() == "ready\n"
        send = [*WIRE, "send", receiver, str(num_bytes)]
        sending = [subprocess.Popen(hosts.on(name, send), stdout=subprocess.PIPE, text=True) for name in senders]
        round_trips_ms = [float(process.communicate(timeout=30)[0]) for process in sending]
        return float(receiving.communicate(timeout=30)[0]), min(round_trips_ms)


def brief(code: int) -> list[str]:
    """A rank that ends with this code. Of one that ends at once, mpirun sometimes does not hear that it has ended."""
    return ["sh", "-c", f"sleep 0.3; exit {code}"]


@pytest.mark.parametrize("delay_ms", ["0", pytest.param("1", marks=with_delay)])
def test_nothing_stays_of_a_job_that_ends(left: Callable[[Job], list[str]], delay_ms: str) -> None:
    for code in (0, 3):
        job = Job(0, *COMMAND, "--delay-ms", delay_ms, "--", *brief(code))
        assert job.finish().code == code
        assert not left(job)


@pytest.mark.parametrize("how", ["INT", "TERM", "a rank", "mpirun hangs"])
def test_nothing_stays_of_a_job_that_is_ended(left: Callable[[Job], list[str]], how: str) -> None:
    limit = ("--timeout-s", "2") if how == "mpirun hangs" else ()
    job = Job(0, *COMMAND, *limit, "--ranks", "2,1", "--", sys.executable, "-c", ENDLESS)
    job.wait_for("all are there")
    assert len(job.ranks()) == 3 and len(left(job)) > 3 + 4
    if how == "mpirun hangs":
        job.finish().refused("did not end within 2 s")
    elif how == "a rank":
        os.kill(job.ranks()[2], signal.SIGKILL)
        assert job.finish().code not in (0, 130, 143)
    else:
        number = signal.Signals[f"SIG{how}"]
        os.kill(job.process.pid, number)
        assert job.finish().code == 128 + number
    assert not left(job)


@with_delay
def test_the_next_job_clears_what_a_killed_one_has_left(left: Callable[[Job], list[str]]) -> None:
    """But not what one has that runs at the same time."""
    other, victim = (
        Job(0, *COMMAND, "--delay-ms", "1", "--ranks", "2", "--", sys.executable, "-c", ENDLESS) for _ in range(2)
    )
    for job in (other, victim):
        job.wait_for("all are there")
    victim.process.kill()
    victim.process.wait()
    assert any(name.startswith("/run/netns") for name in left(victim))
    run(0, *COMMAND, "--", *brief(0)).ok()
    assert not [name for name in left(victim) if not name.startswith("process")]
    assert len(other.ranks()) == 4, "all are alive"
    os.kill(other.process.pid, signal.SIGTERM)
    other.finish()
    assert not left(victim) and not left(other)


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        (["--hosts", "0"], "--hosts 0"),
        (["--hosts", "3", "--ranks", "1,2"], "--ranks 1,2 is for 2 hosts"),
        (["--ranks", "2,0"], "--ranks 2,0"),
        (["--ranks", "two"], "--ranks two"),
        (["--rate-mbit", "0"], "--rate-mbit 0"),
        (["--delay-ms", "-1"], "--delay-ms -1"),
    ],
)
def test_what_cannot_be(flags: list[str], fragment: str, capfd: pytest.CaptureFixture[str]) -> None:
    """In this process: a command of its own would take longer to start than to refuse."""
    assert hosts_module.main([*flags, "--", "true"]) == 2
    out, err = capfd.readouterr()
    assert not out and err.startswith("mpipar: error: ") and err.count("\n") == 1 and fragment in err


def test_no_program_is_one_message() -> None:
    run(0, *COMMAND).refused("-- PROGRAM")


def test_why_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "root" in (why_not() or "")
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "`ip`" in (why_not() or "")


@pytest.mark.parametrize("ranks", ["2,2", "3,1"])
@pytest.mark.parametrize("by", ["slot", "node"])
def test_collectives_between_hosts(ranks: str, by: str) -> None:
    outcome = run(0, *COMMAND, "--ranks", ranks, "--by", by, "--", *BETWEEN_HOSTS).ok()
    order = {"slot": {"2,2": "h1 h1 h2 h2", "3,1": "h1 h1 h1 h2"}, "node": {"2,2": "h1 h2 h1 h2", "3,1": "h1 h2 h1 h1"}}
    assert outcome.lines[-2:] == [f"2 hosts: {order[by][ranks]}", "RESULT ok"]
