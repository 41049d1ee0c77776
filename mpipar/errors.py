"""The errors that mpipar raises on purpose.

    MpiparError                 carries what is known of where it happened: rank, axis, step
     ├── ConfigError            a setting that cannot be; also a ValueError
     ├── DataError              shards that are missing, truncated, damaged or of another tokenizer
     ├── CheckpointError        a checkpoint that is missing, damaged or of another model
     ├── StorageError           a file that cannot be written: a full disk, no permission
     ├── LaunchError            the job was started in a way in which it cannot run
     ├── MessageError           an array that cannot be a message; also a ValueError
     ├── StallError             a peer did not answer in time; also a TimeoutError
     ├── DeadRankError          a rank died, in a job that was started to survive it
     ├── LostRanksError         ranks died, and all that are left know it
     ├── TooFewRanksError       so many died that the job shall not go on
     ├── CorruptionError        replicas that should be equal are not
     ├── DeviceMemoryError      a GPU's memory does not hold the step
     ├── DivergedError          the loss stopped being a number
     └── PeerError              another rank failed and has said why

A message says what was given, what was expected and what to do. Commands print it without a traceback: these are
errors of the input or of the machine, never of the program, for which `assert` and Python's own exceptions are there.
"""

from __future__ import annotations

from typing import Any


class MpiparError(Exception):
    """The base of all errors of mpipar.

    Args:
        message: What was given, what was expected, what to do.
        rank: The global rank on which it happened, if it happened on one.
        axis: The mesh axis of the communication in which it happened.
        step: The training step in which it happened.
    """

    passing = False
    """Whether the same command, started again, may get further: so it is where the machine failed, not the input."""

    exit_code = 1
    """Of the command that ends with it."""

    def __init__(self, message: str, *, rank: int | None = None, axis: str | None = None, step: int | None = None):
        super().__init__(message)
        self.message = message
        self.rank = rank
        self.axis = axis
        self.step = step

    def __str__(self) -> str:
        where = {"rank": self.rank, "axis": self.axis, "step": self.step}
        known = ", ".join(f"{name} {value}" for name, value in where.items() if value is not None)
        return f"{self.message} ({known})" if known else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions pickle by calling the class with `args`, which would lose the keyword-only fields on the way
        # from one rank to another.
        return _rebuild, (type(self), self.message, self.rank, self.axis, self.step)


def _rebuild(
    kind: type[MpiparError], message: str, rank: int | None, axis: str | None, step: int | None
) -> MpiparError:
    return kind(message, rank=rank, axis=axis, step=step)


class ConfigError(MpiparError, ValueError):
    """A setting, or a combination of settings, that cannot be."""

    exit_code = 2


class DataError(MpiparError):
    """Shards that are missing, truncated, damaged, or that belong to another tokenizer."""

    @property
    def what(self) -> str:
        """What is wrong, without advice: for who knows what the file is, and gives its own."""
        return self.message


class DamagedError(DataError):
    """A file whose bytes are not those that were written.

    Args:
        what: Which file, and what is wrong with it.
        advice: What to do, for who knows no better.
    """

    def __init__(self, what: str, advice: str = "", **where: Any):
        super().__init__(f"{what}. {advice}" if advice else what, **where)
        self._what = what

    @property
    def what(self) -> str:
        return self._what


class CheckpointError(MpiparError):
    """A checkpoint that is missing, damaged, or that belongs to another model."""


class StorageError(MpiparError):
    """A file of the run that cannot be written: the disk is full, or permission is missing."""


class LaunchError(MpiparError):
    """A job that was started in a way in which it cannot run, such as n copies of rank 0 of 1."""


class MessageError(MpiparError, ValueError):
    """An array whose dtype, layout or size cannot be sent as asked."""


class StallError(MpiparError, TimeoutError):
    """A peer that did not answer before the deadline."""

    passing = True


class DeadRankError(MpiparError):
    """A rank that died, in a job that was started to survive it (`mpirun --with-ft ulfm`)."""

    passing = True


class LostRanksError(MpiparError):
    """Ranks died, and all that are left know it: what they attempted together has to be done again."""

    passing = True


class TooFewRanksError(MpiparError):
    """So many ranks died that the job shall not go on with the others."""

    passing = True


class CorruptionError(MpiparError):
    """Replicas that should be equal are not, and nobody can tell which is right."""

    passing = True


class DeviceMemoryError(MpiparError):
    """A GPU whose memory does not hold what a step needs."""


class DivergedError(MpiparError):
    """A loss or gradient that was not finite in too many steps in a row."""


class PeerError(MpiparError):
    """Another rank failed. That rank reports the reason; nobody prints this one.

    Args:
        exit_code: Of that rank's error: mpirun gives the code of any.
    """

    def __init__(self, message: str, *, exit_code: int = 1, **where: Any):
        super().__init__(message, **where)
        self.exit_code = exit_code
