"""How far a long command is: a bar on a terminal, now and then a line in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from mpipar.amounts import size

_LOG_INTERVAL_S = 15.0


class Progress:
    """Counts bytes up to a total, on stderr. Only the rank that reports shows anything.

    Args:
        label: What is being done.
        total_bytes: How much there is to do.
        shown: Whether this rank reports.
    """

    def __init__(self, label: str, total_bytes: int, shown: bool):
        self._label = label
        self._total = total_bytes
        self._done = 0
        self._started = self._reported = time.monotonic()
        on_terminal = shown and sys.stderr.isatty()
        self._logs = shown and not on_terminal
        self._bar = tqdm(
            desc=label,
            total=total_bytes,
            unit="B",
            unit_scale=True,
            disable=not on_terminal,
            leave=False,
            file=sys.stderr,
        )

    def advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        self._bar.update(num_bytes)
        now = time.monotonic()
        if self._logs and now - self._reported >= _LOG_INTERVAL_S:
            self._reported = now
            rate = self._done / (now - self._started)
            left_s = (self._total - self._done) / rate if rate else 0.0
            share = self._done / self._total if self._total else 1.0
            amounts = f"{share:4.0%} of {size(self._total)}, {size(rate)}/s, {left_s:,.0f} s left"
            print(f"{self._label}: {amounts}", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()
