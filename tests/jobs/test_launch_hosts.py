"""The supervisor between hosts: one of them dies, and the job goes on with what is left."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.hosts import Hosts, why_not
from tests.jobs.launch import ROOT
from tests.jobs.results import metrics

REASON = why_not()

pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=REASON or "hosts can be made here"),
    pytest.mark.timeout(400),
]

TIME_LIMIT_S = 180.0

# Another host's remote shell, which does not reach the host that is dead.
AGENT = """#!/bin/sh
if [ "$1" = h2 ] && [ -e {dead} ]; then exit 255; fi
exec {agent} "$@"
"""


class Mortal:
    """The second of two hosts.

    Args:
        hosts: Both.
        folder: For the agent through which it is reached as long as it lives.
    """

    def __init__(self, hosts: Hosts, folder: Path):
        agent = next(Path(word) for word in hosts.on("h2", ["true"]) if word.startswith("/"))
        self._namespace = f"{agent.parent.name}-h2"
        self._dead = folder / "dead"
        self.agent = folder / "agent"
        self.agent.write_text(AGENT.format(dead=shlex.quote(str(self._dead)), agent=shlex.quote(str(agent))))
        self.agent.chmod(0o700)

    def processes(self) -> list[int]:
        found = subprocess.run(["ip", "netns", "pids", self._namespace], capture_output=True, text=True, check=True)
        return [int(pid) for pid in found.stdout.split()]

    def die(self) -> None:
        self._dead.touch()
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("min_ranks", [1, 4])
def test_a_host_dies(
    min_ranks: int, train: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on with half of the ranks, or leaves that to a later job."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    run = tmp_path / "run" / "metrics.jsonl"
    with Hosts(2, rate_mbit=1000) as hosts:
        mortal = Mortal(hosts, tmp_path)
        options = ["--hosts", "h1:2,h2:2", "--agent", str(mortal.agent), "--min-ranks", str(min_ranks)]
        options += ["--scratch", str(scratch), "--hang-s", "60", "--mpirun-args=--mca mpi_yield_when_idle 1"]
        command = [sys.executable, *train("--train.steps", 400, "--checkpoint.every", 10)]
        launch = [sys.executable, "-m", "mpipar.launch", *options, "--", *command]
        with (tmp_path / "log").open("w+") as log:
            job = subprocess.Popen(hosts.on("h1", launch), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            deadline = time.monotonic() + TIME_LIMIT_S
            while not run.exists() or len(run.read_bytes().splitlines()) < 20:
                assert job.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.05)
            mortal.die()
            code = job.wait(TIME_LIMIT_S)
        text = (tmp_path / "log").read_text()
        assert "launch: host h2 does not answer: going on without it" in text, text
        assert not list(scratch.iterdir()) and not list((tmp_path / "tmp").glob("mpipar-launch-*"))
        assert not mortal.processes()
    if min_ranks == 4:
        assert code == 75 and "2 ranks are left, and not --min-ranks 4 (exit code 75)" in text, text
        return
    assert code == 0 and "starting again on 2 ranks (1 of 3)" in text, text
    assert "ranks   4 ranks on 2 hosts" in text and "ranks   2 ranks on 1 host," in text
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == list(range(1, 401))
