"""The run folder: everything that is known of one run, and nothing outside it.

    config.toml         the settings, resolved
    metrics.jsonl       one JSON object a line: steps, evaluations and skipped steps, in the order of their steps
    checkpoints/        step-00000100/ ...
    tensorboard/        events, where tensorboard is installed
    loss.png            where matplotlib is installed
    memory-rank*.pickle where a GPU ran out of memory that was recorded

Rank 0 alone touches it, but for the last.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mpipar.errors import ConfigError, StorageError
from mpipar.storage import FileLock, atomic_file, remove_partials

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
        self._lock: FileLock | None = None

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
            lock = FileLock.take(self.path / ".lock")
        if isinstance(lock, str):
            raise ConfigError(f"--run.dir {self.path} is in use by {lock}: wait for its end, or give another --run.dir")
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
            self._lock.release()
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
