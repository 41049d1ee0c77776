"""How long does a job stand still when one of its processes is killed: from SIGKILL to the next step begun?

    python -m benchmarks.recovery --data data/stdlib

It starts jobs itself, and in each it kills random processes at random moments of a step. The contestants:

    mpipar      `mpirun --with-ft ulfm`: the survivors go on. Several die in a job, one after the other, rank 0 too. The
                trainer prints `lost ...` directly before it begins the step again: that is waited for. In it stands how
                long it took one survivor from noticing the death to where all were ready.
    by hand     the whole job is killed, and the same command goes on from its last checkpoint. The trainer prints
                `run ...` directly before its first step.
    torchrun    DDP over gloo (`ddp_worker`): all workers are ended and started again, from a checkpoint of each step.

The clock runs from just before the signal until the line arrives here. What is computed again is not in it: a step for
mpipar, the steps since the checkpoint for the others.

torchrun keeps one store for all its starts, and there the workers may find addresses of the start before, to which gloo
then fails to connect. With TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 each start has a store of its own; both are measured.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.command import leave_when_asked, path_of, run_command, trainer
from benchmarks.machine import comments, this_machine
from benchmarks.watched import Watched
from mpipar.comm import usable_cores
from mpipar.comm.environment import environ_outside
from mpipar.command_line import parse
from mpipar.errors import ConfigError
from mpipar.processor import bf16_is_fast

_START_S = 180.0  # a job may take to come to its first steps
_STEPS_BETWEEN = 3  # from the start, or a death, to the next
_WIDTH = 46  # of the titles
_NEVER = 1_000_000  # steps
_BATCH = 16  # sequences in a step: the trainer's default
_STEP = r"step +\d+/"  # the trainer's line of a step that is done
_HEADER = r"model |step +\d+ seq"  # what it says of its model, and of its steps


@dataclass
class Measured:
    """What was measured so far.

    Args:
        waits: By contestant: seconds from the kill to the next step begun.
        failures: By contestant: kills after which there was none.
        steps: By contestant: seconds of steps in which nobody died.
        ready: Of mpipar's waits, seconds from where a survivor had noticed to where all were ready.
        run: What the trainer says of its model and its step.
    """

    waits: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    failures: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    steps: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    ready: list[float] = field(default_factory=list)
    run: list[str] = field(default_factory=list)

    def table(self) -> str:
        """A line for each contestant, in seconds."""
        names = ["least", "25 %", "median", "75 %", "most", "count", "failed", "a step"]
        lines = [
            comments([*self.run, "s, from SIGKILL to the next step begun; ranks and workers are those before it"]),
            f"# {'':<{_WIDTH}}" + "".join(f"{name:>8}" for name in names),
        ]
        for title in self.waits:
            waits, steps = self.waits[title], self.steps[title]
            spread = np.percentile(waits, [0, 25, 50, 75, 100]) if waits else [None] * 5
            cells = ["-" if seconds is None else f"{seconds:.2f}" for seconds in spread]
            cells += [f"{len(waits)}", f"{self.failures[title]}"]
            cells += [f"{statistics.median(steps):.2f}" if steps else ""]
            lines.append((f"  {title:<{_WIDTH}}" + "".join(f"{cell:>8}" for cell in cells)).rstrip())
        if self.ready:
            median, most = statistics.median(self.ready), max(self.ready)
            lines.append(f"# of mpipar's, from noticing the death to ready: median {median:.2f}, most {most:.2f}")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Times how long jobs stand still when one of their processes is killed."""

    data: Path = Path("data/stdlib")
    """A folder of shards, made by `python -m mpipar.data pack`."""
    ranks: int = 8
    """Of a job of mpipar."""
    least: int = 5
    """Ranks that are left of it in the end."""
    jobs: int = 7
    """Jobs of mpipar."""
    by_hand: int = 3
    """Jobs of mpipar that are killed as a whole and started again."""
    workers: tuple[int, ...] = (8, 4)
    """Of the jobs of torchrun."""
    torchrun: int = 2
    """Jobs of torchrun of each size, with one store and with a store for each start."""
    restarts: int = 3
    """How often torchrun may start the workers again; so many are killed, one after the other."""
    limit_s: float = 120.0
    """After this time a job has failed to recover."""
    seed: int = 1
    """Of who is killed, and when."""

    def run(self) -> None:
        """Measures and prints.

        Raises:
            ConfigError: There is nothing to kill.
            LaunchError: A program is missing, or a job did not come to its first steps.
        """
        if not 1 <= self.least < self.ranks:
            raise ConfigError(f"--least {self.least} must be at least 1 and less than --ranks {self.ranks}")
        if any(count < 2 for count in self.workers) or self.restarts < 1:
            raise ConfigError("--workers must be at least 2, --restarts at least 1")
        if not self.data.is_dir():
            raise ConfigError(f"--data {self.data} does not exist: python -m mpipar.data pack stdlib --out {self.data}")
        print(this_machine("benchmarks.recovery", len(usable_cores())).header(), flush=True)
        measured, chance = Measured(), random.Random(self.seed)
        with tempfile.TemporaryDirectory(prefix="mpipar-recovery-") as folder:
            for number in range(self.jobs):
                self._survived(measured, chance, Path(folder, f"survived-{number}"))
            for number in range(self.by_hand):
                self._by_hand(measured, chance, Path(folder, f"by-hand-{number}"))
            for own_stores in (False, True):
                for count in self.workers:
                    for number in range(self.torchrun):
                        kept = Path(folder, f"torchrun-{count}-{own_stores}-{number}")
                        self._restarted(measured, chance, count, kept, own_stores=own_stores)
        print(measured.table())

    def _survived(self, measured: Measured, chance: random.Random, folder: Path) -> None:
        """A job of mpipar, of which rank after rank dies."""
        with _start(self._train(folder, checkpoint_every=_NEVER)) as job:
            step_s = _steps(job, _STEP)
            measured.run = [line.text for line in job.lines if re.match(_HEADER, line.text)]
            alive = job.ranks("PMIX_RANK")
            for count in range(self.ranks, self.least, -1):
                victim = alive.pop(chance.choice(sorted(alive)))
                title = f"mpipar, {count} ranks"
                said = self._kill(measured, title, job, victim, chance.uniform(0, step_s), begun="lost ")
                if said is None:
                    break
                measured.ready.append(float(said.rpartition("after ")[2].removesuffix(" s")))
                step_s = _steps(job, _STEP)
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            step = json.loads(line)
            measured.steps[f"mpipar, {step['ranks']} ranks"].append(step["step_s"])

    def _by_hand(self, measured: Measured, chance: random.Random, folder: Path) -> None:
        """A job of mpipar that is killed as a whole, and started again."""
        title = f"mpipar, {self.ranks} ranks, started again by hand"
        command = self._train(folder, checkpoint_every=_STEPS_BETWEEN)
        with _start(command) as job:
            step_s = _steps(job, _STEP, count=2 * _STEPS_BETWEEN)
            measured.steps[title].append(step_s)
            time.sleep(chance.uniform(0, step_s))
            began = time.monotonic()
            job.kill()
        with _start(command) as job:
            self._wait(measured, title, job, began, begun="run ")

    def _restarted(
        self, measured: Measured, chance: random.Random, count: int, kept: Path, *, own_stores: bool
    ) -> None:
        """A job of torchrun, of which worker after worker dies."""
        title = f"torchrun, {count} workers{', a store for each start' if own_stores else ''}"
        options = ["--standalone", "--max-restarts", str(self.restarts), "--nproc-per-node", str(count)]
        worker = ["--checkpoint", str(kept), "--batch", str(max(1, _BATCH // count))]
        worker += ["--bf16"] if bf16_is_fast() else []
        env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1" if own_stores else "0"}
        with _start([path_of("torchrun"), *options, "-m", "benchmarks.ddp_worker", *worker], env) as job:
            for number in range(self.restarts):
                step_s = _steps(job, f"start {number}, step ")
                measured.steps[title].append(step_s)
                victim = chance.choice(sorted(job.ranks("RANK").items()))[1]
                begun = f"start {number + 1}, step "
                if self._kill(measured, title, job, victim, chance.uniform(0, step_s), begun) is None:
                    break

    def _kill(
        self, measured: Measured, title: str, job: Watched, victim: int, after_s: float, begun: str
    ) -> str | None:
        """Kills a process after some time, and takes the time to the next step; returns the line that says it."""
        time.sleep(after_s)
        began = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        return self._wait(measured, title, job, began, begun)

    def _wait(self, measured: Measured, title: str, job: Watched, began: float, begun: str) -> str | None:
        waits = measured.waits[title]
        line = job.wait_for(lambda text: text.startswith(begun), self.limit_s)
        if line is None:
            measured.failures[title] += 1
            _say(f"{title}: failed after {time.monotonic() - began:.0f} s")
            return None
        waits.append(line.at - began)
        _say(f"{title}: {line.at - began:.3f} s, {line.text}")
        return line.text

    def _train(self, folder: Path, checkpoint_every: int) -> list[str]:
        """The command of a job of mpipar that does nothing but steps, and checkpoints."""
        settings = {
            "data.dir": self.data,
            "run.dir": folder,
            "run.log-every": 1,
            "run.tensorboard": "false",
            "train.global-batch": _BATCH,
            "train.steps": _NEVER,
            "train.eval-every": _NEVER,
            "elastic.verify-every": 0,
            "checkpoint.every": checkpoint_every,
        }
        launch = [path_of("mpirun"), "--with-ft", "ulfm", "-n", str(self.ranks)]
        return [*launch, *trainer(settings)]


def _start(command: list[str], env: dict[str, str] | None = None) -> Watched:
    return Watched(command, {**environ_outside(os.environ), **(env or {})})


def _steps(job: Watched, pattern: str, count: int = _STEPS_BETWEEN) -> float:
    """Waits for so many lines of steps, which begin like this; returns the time between the last two.

    Raises:
        LaunchError: They did not come.
    """
    times = [job.expect(pattern, _START_S).at for _ in range(count)]
    return times[-1] - times[-2]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    leave_when_asked()
    sys.exit(run_command(lambda: parse(Recovery, "python -m benchmarks.recovery").run()))
