"""metrics.jsonl: one JSON object a line, of a step or of the evaluation after it, in the order of the steps.

A run that goes on from a checkpoint first takes back the lines of later steps, which will be written again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from mpipar.train.run_folder import writing

Key = tuple[int, bool]
"""What a line is about: the step, and whether it is of the evaluation after it."""


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
        self._written = _of_last_step(self._written, key)

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
    return {key: _finite_value(value) for key, value in values.items()}


def _finite_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _finite(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _key(values: Mapping[str, Any]) -> Key:
    return values["step"], "val_loss" in values


def _of_last_step(written: set[Key], key: Key) -> set[Key]:
    """What the lines of the last step are about, behind one that is about `key`."""
    return {other for other in written if other[0] == key[0]} | {key}


def _rewind(path: Path, after_step: int) -> set[Key]:
    """Takes back later lines. Returns what the lines of the last step are about that are left."""
    end, last = 0, set[Key]()
    for values, position in _lines(path):
        if values["step"] > after_step:
            break
        end = position
        last = _of_last_step(last, _key(values))
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
