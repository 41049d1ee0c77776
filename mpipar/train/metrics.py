"""What is measured of a step, and how much memory the ranks really use."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Values = npt.NDArray[np.float64]

_SHOWN_FAULTS = 4


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One step, as a line of metrics.jsonl. Times are rank 0's; what its ranks have together is summed over them."""

    step: int
    loss: float  # nats a token, mean over the step; 0 for a step in which none counts
    lr: float
    grad_norm: float  # before clipping
    tokens: int  # trained on since the run began
    tokens_per_s: float
    step_s: float
    compute_s: float  # forward, backward, optimizer
    comm_s: float  # waiting for communication that computation did not hide
    data_s: float  # waiting for the loader
    bytes_sent: int  # by rank 0, in this step, in messages; what is reduced in shared memory is not sent
    ranks: int  # that are alive
    rank_s: list[float | None]  # by rank, for a microbatch; null for a rank that had none
    peak_memory_bytes: int  # all ranks; proportional set size: shared pages are counted once. On GPUs: of theirs
    mfu: float | None = None  # model FLOP utilisation: of the peak of all GPUs; none on the CPU
    loss_scale: float | None = None  # what the loss was multiplied by, in fp16
    skipped: bool = False  # the loss or a gradient was not finite, and no weight was changed
    faults: str = ""  # the microbatches whose gradients were to blame

    def to_json(self) -> dict[str, Any]:
        """The object of the line."""
        values = asdict(self)
        if not self.skipped:
            del values["skipped"], values["faults"]
        return {name: value for name, value in values.items() if value is not None}


@dataclass(slots=True)
class Totals:
    """What the ranks add up in a step besides gradients.

    Each microbatch's loss has a place of its own, in which all ranks but one have zero, so that nothing rounds between
    ranks; their sum over the step is then the same for any number of them.
    """

    losses: Values  # [M], sums over the tokens of a microbatch
    owners: Values  # [M], the rank that has computed it
    faults: Values  # [M], 1 if its gradient is not finite, or was too large for its grid
    counts: Values  # [n], microbatches of each rank
    seconds: Values  # [n], for all of them
    num_tokens: int = 0  # that count
    stop: bool = False  # some rank was asked to stop
    failed: bool = False  # some rank could not read its data
    memory_bytes: int = 0

    @property
    def loss_sum(self) -> float:
        """Over the step."""
        return exact_sum(self.losses)

    @property
    def num_divided(self) -> int:
        """What sums over the tokens of the step are divided by: 1 where no token counts, and they are all 0."""
        return max(1, self.num_tokens)

    @classmethod
    def none(cls, num_microbatches: int, num_ranks: int, *, stop: bool = False) -> Totals:
        """What a rank begins with."""
        m, n = num_microbatches, num_ranks
        return cls(np.zeros(m), np.zeros(m), np.zeros(m), np.zeros(n), np.zeros(n), stop=stop)

    def pack(self) -> Values:
        """[3 M + 2 n + 4]; doubles hold these counts exactly."""
        counts = [self.num_tokens, self.stop, self.failed, self.memory_bytes]
        return np.concatenate([*self._arrays, np.array(counts, np.float64)])

    def unpack(self, sums: Values) -> Totals:
        """Those of all ranks, from the sum of what they have packed."""
        bounds = np.cumsum([len(values) for values in self._arrays])
        losses, owners, faults, counts, seconds, rest = np.split(sums, bounds)
        num_tokens, stop, failed, memory_bytes = rest
        return Totals(losses, owners, faults, counts, seconds, int(num_tokens), stop > 0, failed > 0, int(memory_bytes))

    def describe_faults(self) -> str:
        """Which microbatches went wrong, and on which ranks; nothing if none did."""
        which = np.flatnonzero(self.faults)[:_SHOWN_FAULTS]
        return ", ".join(f"microbatch {i} (rank {int(self.owners[i])})" for i in which)

    @property
    def _arrays(self) -> list[Values]:
        return [self.losses, self.owners, self.faults, self.counts, self.seconds]


def exact_sum(values: npt.NDArray[np.float64]) -> float:
    """Rounded once, at the end; NaN where infinities cancel."""
    return math.fsum(values) if np.isfinite(values).all() else float(values.sum())


@dataclass(slots=True)
class Clock:
    """Adds up the seconds spent in each part of a step."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times a block."""
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


class PeakMemory:
    """The largest memory of this process that `sample` has seen; on a GPU the most that torch had of it at once.

    The kernel keeps the peak of the resident set, which counts memory that ranks share once for each of them. The
    proportional set size divides it among them, but has to be asked for, and costs milliseconds.
    """

    def __init__(self, device: torch.device) -> None:
        self.bytes = 0
        self._device = device

    def sample(self) -> None:
        """Looks now. Where the kernel does not tell the proportional set size, the resident set stands in."""
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device)
            return
        try:
            text = Path("/proc/self/smaps_rollup").read_text("ascii")
            now = next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))
        except (OSError, StopIteration):
            import resource

            now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.bytes = max(self.bytes, now)
