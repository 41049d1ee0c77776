"""SIGKILL around saves: `python -m tests.jobs.kills --kills 100` loses ranks of runs that save without a pause.

A run of 2 or 4 ranks saves behind every step, in the background in every other life. Its ranks are killed one by one,
at random moments, while the others go on; then all of it at once, launcher and ranks, as when the power fails. The next
life goes on from what is there. Behind each blow all that is still alive is held still, and what is listed is read:

    every checkpoint under its final name verifies, to the last byte
    the last that was seen before is there, or later ones
    no more are listed than are kept, and the one that is being given up for a new one

What happens is a function of the seed; when in a save a blow falls is also the machine's doing.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.command import run_command
from mpipar.checkpoint import load
from mpipar.checkpoint.folder import folder_of, steps
from mpipar.command_line import parse
from mpipar.errors import CheckpointError
from tests.jobs.conftest import TINY, write_text
from tests.jobs.launch import Job, run

KEEP = 2
SETTINGS = ["--train.steps", 1_000_000, "--checkpoint.every", 1, "--checkpoint.keep", KEEP]
SETTINGS += ["--train.eval-every", 1_000_000, "--elastic.verify-every", 0, "--model.dim", 192, "--comm.timeout-s", 30]
COMES_S = 600.0  # a checkpoint, on a busy machine
LONGEST_S = 0.3  # from one checkpoint that is there to the blow: several saves


@dataclass(frozen=True)
class Life:
    """One start of the run.

    Args:
        ranks: How many.
        asynchronous: Whether it saves in the background.
        victims: Ranks that are killed one after the other; then all that are left.
        delays_s: Of each blow, behind the first checkpoint after the last: one more than victims.
    """

    ranks: int
    asynchronous: bool
    victims: Sequence[int]
    delays_s: Sequence[float]


@dataclass
class Score:
    """What came of it.

    Args:
        kills: Blows that fell.
        lives: Starts of the run.
        during: Blows that left a checkpoint half-written.
        verified: Checkpoints that were read to the last byte.
        faults: What was wrong.
    """

    kills: int
    lives: int
    during: int
    verified: int
    faults: list[str]

    def __str__(self) -> str:
        found = "; ".join(self.faults) or "all are whole, and the last good one was never lost"
        return (
            f"{self.kills} kills in {self.lives} lives, {self.during} in the middle of a checkpoint; {self.verified} "
            f"listed checkpoints read: {found}"
        )


@dataclass(frozen=True, kw_only=True)
class Kills:
    """Kills ranks of a run that saves without a pause, and reads every checkpoint that is listed afterwards."""

    kills: int = 100
    """How many blows, the last of each life included."""
    seed: int = 1
    """Of the first life; each has the next."""

    def play(self) -> Score:
        """All lives, and one that comes to its end."""
        with tempfile.TemporaryDirectory(prefix="mpipar-kills-") as folder:
            return Victim(Path(folder)).play(self.kills, self.seed)


class Victim:
    """A run that is killed and goes on.

    Args:
        folder: For its data and all that it writes.
    """

    def __init__(self, folder: Path):
        self._run = folder / "run"
        self._data = folder / "data"
        self._checkpoints = self._run / "checkpoints"
        self._score = Score(0, 0, 0, 0, [])
        self._last = 0
        text = folder / "text"
        text.mkdir()
        write_text(text)
        run(2, "-m", "mpipar.data", "pack", str(text), "--out", str(self._data), "--vocab-size", "300").ok()

    def play(self, kills: int, seed: int) -> Score:
        """Lives with so many blows in all, and a last one that is asked to stop and leaves nothing half-written."""
        while self._score.kills < kills and not self._score.faults:
            life = draw_life(seed + self._score.lives)
            self._live(life, kills)
            print(f"life {self._score.lives}: {life}; {self._score}", flush=True)
        if not self._score.faults:
            self._end()
        return self._score

    def _live(self, life: Life, most: int) -> None:
        self._score.lives += 1
        job = Job(life.ranks, *self._arguments(life), options=["--with-ft", "ulfm"])
        blows = list(zip((*life.victims, None), life.delays_s, strict=True))[: most - self._score.kills]
        try:
            for victim, delay_s in blows:
                self._wait_for(job, self._last + 1)
                time.sleep(delay_s)
                if victim is None:
                    break
                pids = job.processes()
                os.kill(pids[victim], signal.SIGKILL)
                with held_still([pid for rank, pid in pids.items() if rank != victim]):
                    self._look(f"life {self._score.lives}, rank {victim} of {life.ranks} killed")
            if blows[-1][0] is not None:
                return  # that was the last one that was asked for
        finally:
            job.kill()
        self._look(f"life {self._score.lives}, all killed")

    def _look(self, when: str) -> None:
        """Reads what is listed; nobody writes meanwhile."""
        self._score.kills += 1
        self._score.during += any(path.name.startswith(".") for path in self._checkpoints.iterdir())
        listed = steps(self._checkpoints)
        for step in listed:
            try:
                with load(folder_of(self._checkpoints, step)) as found:
                    found.verify()
                self._score.verified += 1
            except CheckpointError as error:
                self._score.faults.append(f"{when}: {error}")
        if not listed or listed[-1] < self._last:
            self._score.faults.append(f"{when}: step {self._last} was there, and now {listed}")
        elif len(listed) > KEEP + 1:
            self._score.faults.append(f"{when}: {listed} are listed, and {KEEP} are kept")
        self._last = max(listed, default=0)

    def _end(self) -> None:
        """A last life: it goes on from the last checkpoint, and ends as a run should."""
        job = Job(2, *self._arguments(Life(2, True, (), ())))
        try:
            self._wait_for(job, self._last + 1)
            job.process.send_signal(signal.SIGUSR1)
            outcome = job.finish().ok()
        finally:
            if job.process.poll() is None:
                job.kill()
        if f"goes on from step {self._last:,} " not in outcome.text:
            self._score.faults.append(f"it did not go on from step {self._last}:\n{outcome.text}")
        left = sorted(path.name for path in self._checkpoints.iterdir())
        if left != [folder_of(self._checkpoints, step).name for step in steps(self._checkpoints)[-KEEP:]]:
            self._score.faults.append(f"{left} is left behind")

    def _wait_for(self, job: Job, step: int) -> None:
        """Until there is a checkpoint of this step, or a later one."""
        deadline = time.monotonic() + COMES_S
        while max(steps(self._checkpoints), default=0) < step:
            assert job.process.poll() is None, f"the run ended by itself:\n{job.text}"
            assert time.monotonic() < deadline, f"a checkpoint of step {step} did not come:\n{job.text}"
            time.sleep(0.001)

    def _arguments(self, life: Life) -> list[str]:
        places = ["--data.dir", self._data, "--run.dir", self._run]
        how = ["--checkpoint.asynchronous", life.asynchronous]
        return ["-m", "mpipar.train", *map(str, [*places, *TINY, *SETTINGS, *how])]


def draw_life(seed: int) -> Life:
    """What happens in one life."""
    rng = random.Random(seed)
    ranks = rng.choice([2, 4])
    victims = rng.sample(range(ranks), rng.randint(1, ranks - 1))
    delays_s = [rng.uniform(0, LONGEST_S) for _ in range(len(victims) + 1)]
    return Life(ranks, seed % 2 == 0, victims, delays_s)


@contextmanager
def held_still(pids: Sequence[int]) -> Iterator[None]:
    """These processes do nothing while the block lasts."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def main() -> int:
    """The command."""
    score = parse(Kills, "python -m tests.jobs.kills").play()
    print(score)
    return int(bool(score.faults))


if __name__ == "__main__":
    sys.exit(run_command(main))
