"""Random deaths: `python -m tests.jobs.chaos --runs 200` kills and stops ranks of small runs, and keeps the score.

Each run is started by the supervisor, loses one to three of its ranks, and has to end with the digest and the metrics
of a run in which nobody died. What happens to it is a function of its seed: how many ranks, SIGKILL or SIGSTOP, when:
while it starts, at a random moment of its steps, or while it writes a checkpoint. Verdicts are kept in a file as they
come; the same command goes on behind the last.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from benchmarks.command import run_command
from mpipar.command_line import parse
from tests.jobs.conftest import TINY, write_text
from tests.jobs.launch import Job, Outcome, run
from tests.jobs.results import digest, digests, exact

When = Literal["start", "steps", "checkpoint"]

STEPS, CHECKPOINT_EVERY = 40, 5
SETTINGS = ["--train.steps", STEPS, "--train.global-batch", 8, "--train.eval-every", 10]
SETTINGS += ["--checkpoint.every", CHECKPOINT_EVERY, "--comm.timeout-s", 15, "--elastic.hang-s", 3]
SUPERVISED = ["--hang-s", "40", "--restarts", "5"]
TIME_LIMIT_S = 240.0


@dataclass(frozen=True)
class Blow:
    """What happens to one rank.

    Args:
        rank: Which.
        stops: SIGSTOP, and not SIGKILL.
        when: In which part of the run.
        delay_s: After the part has begun.
    """

    rank: int
    stops: bool
    when: When
    delay_s: float


@dataclass(frozen=True)
class Verdict:
    """What became of a run.

    Args:
        seed: Its seed.
        right: Whether it ended, with the right digest and the right metrics.
        blows: What was to happen to it.
        landed: How many of them met a living rank.
        why: What was wrong.
        took_s: How long it ran.
        starts: How often the supervisor started it.
    """

    seed: int
    right: bool
    blows: Sequence[Blow]
    landed: int
    why: str
    took_s: float
    starts: int


@dataclass(frozen=True, kw_only=True)
class Chaos:
    """Kills and stops random ranks of many small runs, and counts how many come to the right end."""

    runs: int = 200
    """How many."""
    seed: int = 1
    """Of the first run; each has the next."""
    ranks: int = 4
    """Of a run."""
    verdicts: Path | None = None
    """A file of verdicts, to go on behind; without it they are only printed."""

    logs: Path | None = None
    """A folder for the output of runs that came to a wrong end."""

    def play(self) -> list[Verdict]:
        """All runs."""
        verdicts = self._known()
        seeds = [seed for seed in range(self.seed, self.seed + self.runs) if seed not in verdicts]
        with tempfile.TemporaryDirectory(prefix="mpipar-chaos-") as folder:
            arena = Arena(Path(folder), self.ranks) if seeds else None
            for seed in seeds:
                assert arena is not None
                verdict = arena.play(seed)
                verdicts[seed] = verdict
                self._keep(verdict)
                print(describe(verdict), flush=True)
                if not verdict.right and self.logs is not None:
                    self.logs.mkdir(parents=True, exist_ok=True)
                    (self.logs / f"chaos-{seed}.log").write_text(arena.output, "utf-8")
        return [verdicts[seed] for seed in range(self.seed, self.seed + self.runs)]

    def _known(self) -> dict[int, Verdict]:
        if self.verdicts is None or not self.verdicts.exists():
            return {}
        lines = [json.loads(line) for line in self.verdicts.read_text("utf-8").splitlines()]
        return {line["seed"]: Verdict(**{**line, "blows": [Blow(**blow) for blow in line["blows"]]}) for line in lines}

    def _keep(self, verdict: Verdict) -> None:
        if self.verdicts is not None:
            with self.verdicts.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(verdict)) + "\n")


class Arena:
    """A data set, and what a run without deaths comes to.

    Args:
        folder: For all that is written.
        ranks: Of a run.

    Attributes:
        output: Of the last run.
    """

    def __init__(self, folder: Path, ranks: int):
        self.output = ""
        self._folder = folder
        self._ranks = ranks
        self._data = folder / "data"
        text = folder / "text"
        text.mkdir()
        write_text(text)
        run(2, "-m", "mpipar.data", "pack", str(text), "--out", str(self._data), "--vocab-size", "300").ok()
        undisturbed = run(2, *self._train("undisturbed")).ok()
        self._digest, self._metrics = digest(undisturbed), exact(folder / "undisturbed")

    def play(self, seed: int) -> Verdict:
        """The run of one seed."""
        rng = random.Random(seed)
        blows = draw_blows(rng, self._ranks)
        name = f"run-{seed}"
        began = time.monotonic()
        job = Job(
            0, "-m", "mpipar.launch", "-n", str(self._ranks), *SUPERVISED, "--", sys.executable, *self._train(name)
        )
        landed, why = 0, ""
        try:
            for blow in blows:
                landed += self._strike(job, blow, self._folder / name / "checkpoints")
            why = self._judge(job.finish(TIME_LIMIT_S), self._folder / name)
        except AssertionError as error:
            why = str(error).splitlines()[0]
        took_s = time.monotonic() - began
        starts = 1 + sum("starting again" in line for line in job.output)
        self.output = job.text
        shutil.rmtree(self._folder / name, ignore_errors=True)
        return Verdict(seed, not why, blows, landed, why, round(took_s, 1), starts)

    def _train(self, name: str) -> list[str]:
        places = ["--data.dir", self._data, "--run.dir", self._folder / name]
        return ["-m", "mpipar.train", *map(str, [*places, *TINY, *SETTINGS])]

    def _judge(self, outcome: Outcome, run_folder: Path) -> str:
        """What is wrong with the end of a run; nothing, if all is right."""
        if outcome.code:
            return f"exit code {outcome.code}"
        if digests(outcome)[-1:] != [self._digest]:
            return "another digest"
        return "" if exact(run_folder) == self._metrics else "other metrics"

    def _strike(self, job: Job, blow: Blow, checkpoints: Path) -> bool:
        """Waits for the moment, and strikes. Whether the rank was there to be hit."""
        while job.process.poll() is None and not has_come(blow.when, job, checkpoints):
            time.sleep(0.002)
        time.sleep(blow.delay_s)
        ranks = job.processes() if job.process.poll() is None else {}
        if blow.rank not in ranks:
            return False
        try:
            os.kill(ranks[blow.rank], signal.SIGSTOP if blow.stops else signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True


def draw_blows(rng: random.Random, ranks: int) -> list[Blow]:
    """One to three, in the order of a run's parts."""
    order: list[When] = ["start", "steps", "checkpoint"]
    longest = {"start": 5.0, "steps": 2.0, "checkpoint": 0.02}
    blows = []
    for rank in rng.sample(range(ranks), rng.randint(1, min(3, ranks))):
        when = rng.choices(order, weights=[1, 3, 2])[0]
        blows.append(Blow(rank, rng.random() < 0.25, when, round(rng.uniform(0, longest[when]), 3)))
    return sorted(blows, key=lambda blow: (order.index(blow.when), blow.delay_s))


def has_come(when: When, job: Job, checkpoints: Path) -> bool:
    """Whether this part of a run has begun."""
    if when == "start":
        return True
    if when == "steps":
        return any(line.startswith("step ") for line in job.output)
    return checkpoints.is_dir() and any(path.name.startswith(".") for path in checkpoints.iterdir())


def describe(verdict: Verdict) -> str:
    """A line."""
    blows = [
        f"{'stop' if blow.stops else 'kill'} rank {blow.rank} in {blow.when} +{blow.delay_s:.2f} s"
        for blow in verdict.blows
    ]
    said = "right" if verdict.right else f"WRONG: {verdict.why}"
    again = [f"{verdict.starts} starts"] if verdict.starts > 1 else []
    return f"{verdict.seed:>5}  {said:<6} {verdict.took_s:6.1f} s  {', '.join(blows + again)}"


def score(verdicts: Sequence[Verdict]) -> str:
    """The last line."""
    right = sum(verdict.right for verdict in verdicts)
    landed = sum(verdict.landed for verdict in verdicts)
    again = sum(verdict.starts > 1 for verdict in verdicts)
    typical = statistics.median(verdict.took_s for verdict in verdicts)
    return (
        f"{right} of {len(verdicts)} came to the right end; {landed} ranks were hit, {again} runs were started again, "
        f"median {typical:.1f} s"
    )


def main() -> int:
    """The command."""
    played = parse(Chaos, "python -m tests.jobs.chaos").play()
    print(score(played))
    return int(not all(verdict.right for verdict in played))


if __name__ == "__main__":
    sys.exit(run_command(main))
