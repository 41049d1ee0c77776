"""What does one slow rank cost a step, when microbatches are dealt evenly, and when ranks claim them?

    python -m benchmarks.balance --data data/stdlib

The trainer runs on 2 ranks of one host, and on 2 hosts of one rank each (`benchmarks.hosts`; left out where they cannot
be had). Of the last rank every few milliseconds some are taken away, by SIGSTOP and SIGCONT, so that it is as slow as
asked. On one host ranks claim from a counter; between hosts, shares follow the speed that each host was seen to have.
Where nothing is communicated and microbatches can be cut, a step takes 2 / (1 + 1 / slowdown) times as long: that is
the bound. All runs must come to the same digest.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import hosts
from benchmarks.command import leave_when_asked, path_of, run_command, trainer
from benchmarks.machine import this_machine
from benchmarks.watched import Watched
from mpipar.comm.environment import environ_outside
from mpipar.command_line import parse
from mpipar.errors import ConfigError

_RANKS = 2
_CYCLE_S = 0.02
_LIMIT_S = 600.0  # for what a job says next
_SETTLED = 5  # steps, after which a host's speed is known


@dataclass(frozen=True, kw_only=True)
class Balance:
    """Times training steps in which one of two ranks is slow."""

    data: Path = Path("data/stdlib")
    """A folder of shards, made by `python -m mpipar.data pack`."""
    slowdown: float = 2.0
    """How many times as long as the other the slow rank takes."""
    microbatches: int = 12
    """In a step."""
    steps: int = 25
    """Of each run."""

    def run(self) -> int:
        """Measures and prints; returns 1 if a run came to other bits than the first.

        Raises:
            ConfigError: There is no data, or nothing to measure.
            LaunchError: A job did not come to its end.
        """
        if not self.data.is_dir():
            raise ConfigError(f"--data {self.data} does not exist: python -m mpipar.data pack stdlib --out {self.data}")
        if self.slowdown <= 1:
            raise ConfigError(f"--slowdown {self.slowdown:g} must be more than 1")
        if self.steps <= _SETTLED:
            raise ConfigError(f"--steps {self.steps} must be more than {_SETTLED}")
        print(this_machine("benchmarks.balance", _RANKS).header())
        bound = 2 / (1 + 1 / self.slowdown)
        print(f"# median step of {self.microbatches} microbatches, s; bound where one rank is slow: {bound:.2f} times")
        print(f"# {'':<26}{'both alike':>12}{f'one {self.slowdown:g} x slow':>16}{'times':>8}", flush=True)
        digests = set()
        reason = hosts.why_not()
        with tempfile.TemporaryDirectory(prefix="mpipar-balance-") as folder:
            for place in ("one host", "two hosts"):
                if place == "two hosts" and reason is not None:
                    print(f"# no two hosts: {reason}")
                    continue
                for balance in (False, True):
                    times = []
                    for slow in (False, True):
                        kept = Path(folder, f"{place}-{balance}-{slow}")
                        digests.add(self._play(kept, apart=place == "two hosts", balance=balance, slow=slow))
                        times.append(_step_s(kept))
                    alike, slowed = times
                    title = f"{place}, {'claimed' if balance else 'dealt evenly'}"
                    print(f"  {title:<26}{alike:>12.3f}{slowed:>16.3f}{slowed / alike:>8.2f}", flush=True)
        print(f"# {'all runs have one digest' if len(digests) == 1 else 'RUNS DIFFER IN THEIR DIGESTS'}")
        return int(len(digests) > 1)

    def _play(self, folder: Path, *, apart: bool, balance: bool, slow: bool) -> str:
        """One run; returns its digest."""
        settings = {
            "data.dir": self.data,
            "run.dir": folder,
            "run.log-every": 1,
            "run.tensorboard": "false",
            "run.sample-tokens": 0,
            "train.steps": self.steps,
            "train.microbatch": 2,
            "train.global-batch": 2 * self.microbatches,
            "train.eval-every": self.steps,
            "checkpoint.every": self.steps,
            "elastic.balance": str(balance).lower(),
            "elastic.verify-every": 0,
        }
        train = trainer(settings)
        if apart:
            command = [sys.executable, "-m", "benchmarks.hosts", "--hosts", str(_RANKS), "--", *train]
        else:
            command = [path_of("mpirun"), "-n", str(_RANKS), *train]
        with Watched(command, environ_outside(os.environ)) as job:
            job.expect(r"step +1/", _LIMIT_S)
            with slowed(job.ranks("PMIX_RANK")[_RANKS - 1], self.slowdown) if slow else contextlib.nullcontext():
                job.expect(rf"step +{self.steps}/", _LIMIT_S)
            digest = job.expect("digest: ", _LIMIT_S).text
            job.expect("done: ", _LIMIT_S)
        return digest


@contextlib.contextmanager
def slowed(process: int, factor: float) -> Iterator[None]:
    """While it lasts, the process is stopped for a part of each cycle."""
    over = threading.Event()

    def throttle() -> None:
        with contextlib.suppress(ProcessLookupError):
            while not over.is_set():
                os.kill(process, signal.SIGSTOP)
                time.sleep(_CYCLE_S * (1 - 1 / factor))
                os.kill(process, signal.SIGCONT)
                time.sleep(_CYCLE_S / factor)

    thread = threading.Thread(target=throttle)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _step_s(folder: Path) -> float:
    """The median step of a run, once speeds are known."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    times: list[float] = [line["step_s"] for line in lines if "step_s" in line and line["step"] > _SETTLED]
    return statistics.median(times)


if __name__ == "__main__":
    leave_when_asked()
    sys.exit(run_command(lambda: parse(Balance, "python -m benchmarks.balance").run()))
