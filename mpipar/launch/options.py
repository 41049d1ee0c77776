"""The command line of the supervisor."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mpipar import command_line
from mpipar.errors import ConfigError

_DESCRIPTION = """Runs a command of mpipar under mpirun, and starts it again when it is lost.

    python -m mpipar.launch -n 8 -- python -m mpipar.train --data.dir data/stdlib --run.dir runs/first

A rank, a host or the network that dies, a start that fails, a job that hangs: it is started again from its last
checkpoint, on the hosts that are left. TERM, USR1 or HUP: it saves and ends. A second of them, or Ctrl-C: it ends at
once. When this returns, nothing of the job is running.

Exit codes: 0 all is done; 75 not done, the same command goes on (it was asked to stop, or --min-ranks are not left):
for a batch job, the moment to requeue; 1 it failed, and would again: an error of the input, or --restarts were of no
use; 2 an option that does not exist or cannot be; 130 Ctrl-C."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """See `_DESCRIPTION`."""

    ranks: Annotated[int | None, tyro.conf.arg(aliases=["-n"])] = None
    """Ranks. Without it, one for each slot of --hosts or of the Slurm allocation."""
    min_ranks: int = 1
    """With fewer ranks than this it is not started again, because hosts are lost, but ends with 75."""
    restarts: int = 3
    """How many starts may follow a crash without one that writes a new checkpoint. After each that does, the count
    begins anew."""
    hang_s: float = 1800.0
    """A job that gives no sign of life for this time, in seconds, is ended, and counts as crashed. A step is a sign: it
    has to be longer than a start, an evaluation, a step. 0 for no limit: only the trainer gives signs."""
    grace_s: float = 90.0
    """How long a job that is asked to stop may take to save and leave, in seconds. Then it is killed."""
    hosts: str | None = None
    """Hosts and the ranks that each takes: h1:4,h2:4. Without it those of the Slurm allocation, or this host."""
    agent: str | None = None
    """What runs a command on another host, called like ssh; for mpirun too. Without it srun in a Slurm allocation, else
    ssh."""
    mpirun: str | None = None
    """The mpirun to use. Without it the one beside this Python, or else the first on the PATH."""
    mpirun_args: str = ""
    """More arguments for mpirun, as in --mpirun-args="--mca pml ucx"."""
    in_place: bool = True
    """Start with the fault tolerance of MPI, where it has it (Open MPI 5), so that ranks can survive the death of
    others. --no-in-place leaves faster networks to choose from, and the death of a rank then is a new start."""
    scratch: Path | None = None
    """A folder that all hosts see, for what the job reports. Without it that of temporary files, or with several hosts
    the current one. Nothing stays in it."""

    def __post_init__(self) -> None:
        for name, least in (("ranks", 1), ("min_ranks", 1), ("restarts", 0), ("hang_s", 0), ("grace_s", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least {least}")


def parse(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """The options, and the command behind `--`.

    Raises:
        ConfigError: An option does not exist or cannot be, or there is no command.
        SystemExit: --help was asked for, and printed.
    """
    own, command = split(arguments)
    options = command_line.parse(Options, "python -m mpipar.launch", own, description=_DESCRIPTION)
    if not command:
        raise ConfigError("which command? python -m mpipar.launch -n 8 -- python -m mpipar.train ...")
    if shutil.which(command[0]) is None:
        raise ConfigError(f"there is no program {command[0]!r}")
    return options, command


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is before the first `--`, and what is behind it."""
    own = list(arguments)
    end = own.index("--") if "--" in own else len(own)
    return own[:end], own[end + 1 :]
