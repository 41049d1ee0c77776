"""What a job and its supervisor tell each other: a few files in a folder that all ranks see.

    MPIPAR_LAUNCH=FOLDER     set for a job that `python -m mpipar.launch` has started
    MPIPAR_LAUNCH_AGAIN=1    and an earlier start of the same command has come as far as a sign of life
    FOLDER/outcome           how the command ended, as JSON; a job that crashed leaves none
    FOLDER/alive             the last finished step and the last saved one, as JSON; the first sign comes when the
                             start has taken possession of what it works on

The exit code of mpirun cannot take the place of the first: with fault tolerance on it is 0 even when all ranks were
killed. Without a supervisor nothing is written. This module imports nothing of MPI, so that both sides can use it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

FOLDER = "MPIPAR_LAUNCH"
AGAIN = "MPIPAR_LAUNCH_AGAIN"

Ending = Literal["done", "stopped", "failed"]
"""All is done; asked to stop before the end, the same command goes on; the same command would only fail again."""

_SIGN_EVERY_S = 1.0


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Args:
        outcome: Done, stopped or failed.
        message: Why, for people.
    """

    outcome: Ending
    message: str = ""


@dataclass(frozen=True)
class Sign:
    """A sign of life.

    Args:
        step: The last finished step.
        saved: The step of the last checkpoint that was written since the job started; 0 if there is none yet.
    """

    step: int = 0
    saved: int = 0


def write_outcome(outcome: Ending, message: str = "", environ: Mapping[str, str] = os.environ) -> None:
    """Tells the supervisor how the command ended. For one rank, any one, when nothing can go wrong any more."""
    if FOLDER in environ:
        _write(Path(environ[FOLDER], "outcome"), Outcome(outcome, message))


def read_outcome(folder: Path) -> Outcome | None:
    """What the job has said of its end; None if it has said nothing."""
    values = _read(folder / "outcome")
    if values.get("outcome") not in get_args(Ending):
        return None
    return Outcome(values["outcome"], str(values.get("message", "")))


class SignsOfLife:
    """Tells the supervisor that the run goes on, and how far it has come. For the rank that speaks."""

    def __init__(self, environ: Mapping[str, str] = os.environ):
        self._path = Path(environ[FOLDER], "alive") if FOLDER in environ else None
        self._last = Sign()
        self._due = 0.0

    def give(self, step: int, saved: int = 0) -> None:
        """Says that a step is finished. Once a second is enough, so a step does not wait for a file system."""
        sign = Sign(step, max(saved, self._last.saved))
        if self._path is None or (time.monotonic() < self._due and sign.saved == self._last.saved):
            return
        _write(self._path, sign)
        self._last, self._due = sign, time.monotonic() + _SIGN_EVERY_S


def read_sign(folder: Path) -> Sign | None:
    """The last sign of life; None if there is none yet."""
    values = _read(folder / "alive")
    return Sign(int(values["step"]), int(values["saved"])) if values.keys() == {"step", "saved"} else None


def started_again(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether an earlier start of the same command has begun what this one is to go on with."""
    return environ.get(AGAIN) == "1"


def _write(path: Path, said: Outcome | Sign) -> None:
    partial = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):  # the supervisor then hears nothing, and judges by that
        partial.write_text(json.dumps(asdict(said)), "utf-8")
        partial.replace(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):  # it is not there, or a network file system shows half of it
        return {}
    return values if isinstance(values, dict) else {}
