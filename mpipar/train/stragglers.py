"""Ranks that take longer than the others for a microbatch: named, so that somebody looks at their host."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from mpipar.comm import names

_SLOW = 1.5  # times the median
_LEAST_RANKS = 3  # of two, who is slow?


class Stragglers:
    """Looks at windows of some steps.

    Args:
        every: Steps in a window.
    """

    def __init__(self, every: int):
        self._every = every
        self._seen: list[Sequence[float | None]] = []

    def look(self, seconds: Sequence[float | None]) -> str:
        """Takes a step in, and says who is slow, if a window ends here and somebody is; else nothing.

        Args:
            seconds: For a microbatch, by rank; None for one that had none.
        """
        if self._seen and len(self._seen[-1]) != len(seconds):  # ranks have died, the others have new numbers
            self._seen.clear()
        self._seen.append(seconds)
        if len(self._seen) < self._every:
            return ""
        means = {}
        for rank, of_rank in enumerate(zip(*self._seen, strict=True)):
            known = [s for s in of_rank if s is not None]
            if known:
                means[rank] = statistics.median(known)
        self._seen.clear()
        if len(means) < _LEAST_RANKS:
            return ""
        typical = statistics.median(means.values())
        slow = [rank for rank, mean in means.items() if mean > _SLOW * typical]
        if not slow:
            return ""
        worst = max(means[rank] for rank in slow) / typical
        return f"{names(slow)}: up to {worst:.1f} times the median time for a microbatch"
