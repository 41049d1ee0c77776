"""The run folder: everything that is known of one run, and nothing outside it.

    config.toml         the settings, resolved
    metrics.jsonl       one JSON object a line: steps, evaluations and skipped steps, in the order of their steps
    checkpoints/        step-00000100/ ...
    tensorboard/        events, where tensorboard is installed
    loss.png            where matplotlib is installed

Rank 0 alone touches it. A run that goes on from a checkpoint first takes back the lines of later steps, which will be
written again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mpipar.errors import ConfigError, StorageError
from mpipar.storage import atomic_file, remove_partials

_TAKE_OVER_S = 10.0  # a file server may be late to notice that the holder of a lock is dead


class RunFolder:
    """The names inside a run folder.

    Args:
        path: The folder; made by `create`.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.toml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.plot = path / "loss.png"
        self._lock: int | None = None

    def holds_a_run(self) -> bool:
        """Whether a run has been kept here before."""
        return self.metrics.exists() or any(self.checkpoints.glob("step-*"))

    def create(self) -> None:
        """Makes the folder.

        Raises:
            ConfigError: It cannot be made, or cannot be written to.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"--run.dir {self.path} is a file: give the name of a folder")
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--run.dir {self.path} cannot be made: {error.strerror}") from error
        if not os.access(self.path, os.W_OK):
            raise ConfigError(f"--run.dir {self.path} cannot be written to")

    def claim(self) -> None:
        """Keeps other jobs out of the folder for as long as this process lives; the kernel frees the lock with it.

        Where the file system has no locks it does nothing.

        Raises:
            ConfigError: A job that is still running has it.
        """
        with writing(self.path):
            lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(lock, 200, 0).decode(errors="replace").strip() or "another job"
            os.close(lock)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return  # a file system without locks, as some cluster file systems are mounted: nobody can be kept out
            raise ConfigError(
                f"--run.dir {self.path} is in use by {holder}: wait for its end, or give another --run.dir"
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
        self._lock = lock

    def take_over(self) -> None:
        """Claims the folder from a rank that died, and removes what it has half written.

        Raises:
            ConfigError: The folder is somebody else's by now.
        """
        deadline = time.monotonic() + _TAKE_OVER_S
        while True:
            try:
                self.claim()
                break
            except ConfigError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        self.tidy()

    def tidy(self) -> None:
        """Removes what killed writers have left."""
        with writing(self.path):
            remove_partials(self.path)
            remove_partials(self.checkpoints)

    def release(self) -> None:
        """Lets other jobs into the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def move_aside(self) -> Path:
        """Renames the folder of an earlier run to the first free NAME.old-K; returns that.

        Raises:
            ConfigError: A job that is still running has the folder.
        """
        self.claim()
        for k in range(1, 10_000):
            aside = self.path.with_name(f"{self.path.name}.old-{k}")
            if not aside.exists():
                with writing(aside):
                    self.path.rename(aside)
                self.release()
                return aside
        raise ConfigError(f"--run.dir {self.path}: there are thousands of earlier runs beside it: remove some")

    def write_config(self, toml: str) -> None:
        """Keeps the settings of the run."""
        with writing(self.config), atomic_file(self.config) as partial:
            partial.write_text(toml, "utf-8")


class Metrics:
    """metrics.jsonl, open for appending. Each line is with the operating system when `write` returns.

    Args:
        path: The file.
        after_step: Lines of later steps are taken back first, and with them a line that a kill cut in two.
    """

    def __init__(self, path: Path, after_step: int):
        self._path = path
        with writing(path):
            self._written = _rewind(path, after_step)
            self._file: IO[bytes] = path.open("ab", buffering=0)

    def write(self, values: Mapping[str, Any]) -> None:
        """Appends one object, if it is not there yet. JSON has no NaN: what is not finite becomes null."""
        key = _key(values)
        if key in self._written:
            return
        with writing(self._path):
            self._file.write(json.dumps(_finite(values), allow_nan=False).encode() + b"\n")
        self._written = {key} if key[0] not in {step for step, _ in self._written} else self._written | {key}

    def sync(self) -> None:
        """Makes what was written survive the loss of power: before a checkpoint says that it has happened."""
        with writing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl; none if there is no file."""
    return [values for values, _ in _lines(path)]


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses is told as an error of the run, with the file's name."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error.strerror or error}. Make room, or give another --run.dir; the same "
            "command goes on from the latest checkpoint"
        ) from error


def _key(values: Mapping[str, Any]) -> tuple[int, bool]:
    """What a line is about: a step, or the evaluation after it."""
    return values["step"], "val_loss" in values


def _rewind(path: Path, after_step: int) -> set[tuple[int, bool]]:
    """Takes back later lines. Returns what the lines of the last step are about that are left."""
    end, last = 0, set[tuple[int, bool]]()
    for values, position in _lines(path):
        if values["step"] > after_step:
            break
        end = position
        key = _key(values)
        last = {other for other in last if other[0] == key[0]} | {key}
    if path.exists():
        os.truncate(path, end)
    return last


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """(object, position behind it) of each complete line."""
    if not path.exists():
        return
    position = 0
    with path.open("rb") as file:
        for line in file:
            position += len(line)
            if not line.endswith(b"\n"):
                return
            try:
                values = json.loads(line)
            except ValueError:  # what a loss of power can leave of lines that no checkpoint relies on
                return
            yield values, position
