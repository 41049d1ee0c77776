"""What follows from how a job ended. Pure: no clock, no process, no file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mpipar.supervised import Outcome, Sign

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_AGAIN = 75  # EX_TEMPFAIL of sysexits.h, which batch systems and mailers alike take for "later"
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class End:
    """The end of one start.

    Args:
        how: For people: "ended without a word (exit code 137 of mpirun)".
        outcome: What the job said of it.
        asked: What the supervisor was asked to do meanwhile: nothing, to stop, or to end at once.
        sign: Its last sign of life; None if there was none.
    """

    how: str
    outcome: Outcome | None
    asked: Literal["stop", "interrupt"] | None = None
    sign: Sign | None = None


@dataclass(frozen=True)
class Limits:
    """What the user allows.

    Args:
        restarts: How many starts may follow the first of a row that saves nothing new.
        min_ranks: The fewest ranks with which to start.
    """

    restarts: int
    min_ranks: int


@dataclass(frozen=True)
class Verdict:
    """What to do.

    Args:
        exit_code: Leave with this; None starts the command again.
        why: For people; empty if there is nothing to say.
    """

    exit_code: int | None
    why: str


def judge(end: End, limits: Limits, *, futile: int, ranks_left: int) -> Verdict:
    """What follows from the end of a start.

    A crash is worth another start as long as starts get further: one that has saved a checkpoint which none before it
    had begins the count anew.

    Args:
        end: How it ended.
        limits: What the user allows.
        futile: Starts in a row, this one included, since the last new checkpoint.
        ranks_left: With how many ranks it could be started now.
    """
    said = end.outcome.outcome if end.outcome else None
    reached = f" after step {end.sign.step:,}" if end.sign and end.sign.step else ""
    if said == "done":
        return Verdict(EXIT_DONE, "")
    if said == "failed":
        return Verdict(EXIT_FAILED, f"failed{reached}: the same command would fail again")
    if said == "stopped" and end.asked != "interrupt":
        return Verdict(EXIT_AGAIN, f"stopped{reached}: the same command goes on from there")
    crashed = f"the job {end.how}{reached}"
    if end.asked is not None:
        code = EXIT_INTERRUPTED if end.asked == "interrupt" else EXIT_AGAIN
        return Verdict(code, f"{crashed}: the same command goes on from the last checkpoint")
    if ranks_left < limits.min_ranks:
        return Verdict(EXIT_AGAIN, f"{crashed}: {ranks_left} ranks are left, and not --min-ranks {limits.min_ranks}")
    if futile > limits.restarts:
        return Verdict(EXIT_FAILED, f"{crashed}: given up after {_times(futile)} without a new checkpoint")
    on = "1 rank" if ranks_left == 1 else f"{ranks_left} ranks"
    return Verdict(None, f"{crashed}: starting again on {on} ({futile} of {limits.restarts})")


def _times(count: int) -> str:
    return "1 start" if count == 1 else f"{count} starts in a row"
