"""Do runs of several sizes, some with ranks that die, come to one curve? Draws them over each other:

    python -m benchmarks.dying --data data/stdlib --out docs/exact.png

It runs the trainer with its default model on 1, 3, 8 and 4 ranks; of the last two jobs ranks are killed one after the
other, rank 0 first. Beside them it draws a run whose gradients are summed as floats are, which leaves the line. The
exit code is 1 if another does.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.command import leave_when_asked, path_of, run_command, trainer
from benchmarks.curves import draw, read, verdict
from benchmarks.plot import check_plot
from benchmarks.watched import Watched
from mpipar.comm.environment import environ_outside
from mpipar.command_line import parse
from mpipar.errors import ConfigError

_LIMIT_S = 1800.0  # for what a job says next: its end, at most


@dataclass(frozen=True)
class Case:
    """A run.

    Args:
        label: What it is called.
        ranks: At its start.
        deaths: Of how many of them, evenly over the run.
        exact: Whether sums do not round.
    """

    label: str
    ranks: int
    deaths: int = 0
    exact: bool = True


CASES = (
    Case("1 rank", 1),
    Case("3 ranks", 3),
    Case("8 ranks, 5 killed", 8, deaths=5),
    Case("4 ranks, 3 killed", 4, deaths=3),
    Case("2 ranks, ordinary sums", 2, exact=False),
)


@dataclass(frozen=True, kw_only=True)
class Dying:
    """Draws the losses of runs on several numbers of ranks, some of which die."""

    data: Path = Path("data/stdlib")
    """A folder of shards, made by `python -m mpipar.data pack`."""
    steps: int = 120
    """Of each run."""
    seed: int = 1
    """Of who is killed."""
    out: Annotated[Path, tyro.conf.arg(metavar="PNG")] = Path("dying.png")
    """The picture."""

    def run(self) -> int:
        """Runs, draws, and prints how far each run is from the first. Returns 1 if an exact one is anywhere else.

        Raises:
            ConfigError: There is no data, or nothing to draw with.
            LaunchError: A job did not come to its end.
        """
        check_plot(self.out, "--out")
        if not self.data.is_dir():
            raise ConfigError(f"--data {self.data} does not exist: python -m mpipar.data pack stdlib --out {self.data}")
        if self.steps < 10:
            raise ConfigError(f"--steps {self.steps} must be at least 10, for deaths to come between them")
        chance = random.Random(self.seed)
        with tempfile.TemporaryDirectory(prefix="mpipar-dying-") as folder:
            curves = []
            for number, case in enumerate(CASES):
                kept = Path(folder, str(number))
                print(f"{case.label}: {self._play(case, chance, kept)}", flush=True)
                curves.append(read(kept, case.label))
            first, *others = curves
            verdicts = [verdict(curve, first) for curve in others]
            for curve, said in zip(others, verdicts, strict=True):
                print(f"{curve.label}: {said}")
            draw(curves, self.out, f"{self.steps} steps, ranks killed by SIGKILL")
        print(f"plot    {self.out}")
        apart = [any(curve.distance(first).values()) for curve in others]
        return int(any(differs for case, differs in zip(CASES[1:], apart, strict=True) if case.exact))

    def _play(self, case: Case, chance: random.Random, folder: Path) -> str:
        """One run, with its deaths; returns the digest line of its end."""
        command = self._command(case, folder)
        with Watched(command, environ_outside(os.environ)) as job:
            alive: dict[int, int] = {}
            for number in range(case.deaths):
                step = self.steps * (number + 1) // (case.deaths + 1)
                job.expect(rf"step +{step}/", _LIMIT_S)
                alive = alive or job.ranks("PMIX_RANK")
                victim = 0 if number == 0 else chance.choice(sorted(alive))
                os.kill(alive.pop(victim), signal.SIGKILL)
                print(f"  {job.expect('lost ', _LIMIT_S).text}", flush=True)
            said = job.expect("digest: ", _LIMIT_S).text
            job.expect("done: ", _LIMIT_S)
        return said

    def _command(self, case: Case, folder: Path) -> list[str]:
        settings = {
            "data.dir": self.data,
            "run.dir": folder,
            "run.log-every": 1,
            "run.tensorboard": "false",
            "run.sample-tokens": 0,
            "train.steps": self.steps,
            "train.eval-every": self.steps,
            "train.reproducible": str(case.exact).lower(),
            "checkpoint.every": self.steps,
        }
        launch = [path_of("mpirun"), "--with-ft", "ulfm", "-n", str(case.ranks)]
        return [*launch, *trainer(settings)]


if __name__ == "__main__":
    leave_when_asked()
    sys.exit(run_command(lambda: parse(Dying, "python -m benchmarks.dying").run()))
