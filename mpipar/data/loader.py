"""Microbatches, prepared while the last one computes.

Microbatch i of step s holds the sequences s * global_batch + i * microbatch ... of the global order, whoever asks for
it: a loader has no state but what it has read ahead, and a step may be taken up anywhere, by any rank.

One background thread reads and converts what comes next. It makes no MPI call. What goes wrong in it is raised where
its batch is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch

from mpipar.data.order import SampleOrder
from mpipar.data.shards import ShardSet
from mpipar.errors import DataError

_VALIDATION_SEED = 0

Key = tuple[int, int]  # step, index of the microbatch


@dataclass(frozen=True)
class Microbatch:
    """One of the microbatches of a step.

    Args:
        index: In the step.
        tokens: int64 [B, seq_len + 1].
        is_last: Whether this rank has no more of the step.
    """

    index: int
    tokens: torch.Tensor
    is_last: bool


class Loader:
    """The microbatches of a split.

    Args:
        shards: Where the tokens are. Closed with the loader.
        order: Which sample is where.
        microbatch: Sequences in a microbatch, B.
        num_microbatches: Microbatches in a step.
    """

    def __init__(self, shards: ShardSet, order: SampleOrder, microbatch: int, num_microbatches: int):
        self.shards = shards
        self.order = order
        self.num_microbatches = num_microbatches
        self._microbatch = microbatch
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mpipar-loader")
        self._ahead: dict[Key, Future[torch.Tensor]] = {}

    def microbatch(self, step: int, index: int) -> torch.Tensor:
        """The tokens of one microbatch: int64 [B, seq_len + 1]. Pure.

        Raises:
            DataError: A shard is damaged where it was read.
        """
        first = (step * self.num_microbatches + index) * self._microbatch
        shards, offsets = self.order.locate(np.arange(first, first + self._microbatch))
        tokens = torch.empty((self._microbatch, self.order.seq_len + 1), dtype=torch.int64)
        rows = tokens.numpy()
        for row, shard, offset in zip(rows, shards.tolist(), offsets.tolist(), strict=True):
            row[:] = self.shards.read(shard, offset, row.size)
        return tokens

    def microbatches(self, step: int, mine: Iterable[int], then: Sequence[int] = ()) -> Iterator[Microbatch]:
        """The microbatches of a step whose indices are `mine`, in that order.

        Args:
            step: Steps before it.
            mine: Indices. They are asked for one ahead, so that the next microbatch is read while one computes.
            then: Those with which the next step will begin, to be read ahead too; if it does not, that work is lost.
        """
        indices = iter(mine)
        index = next(indices, None)
        while index is not None:
            following = next(indices, None)
            coming = [(step + 1, i) for i in then[:1]] if following is None else [(step, following)]
            batch = self._ahead.pop((step, index), None)
            self._read_ahead(coming)
            tokens = batch.result() if batch else self.microbatch(step, index)
            yield Microbatch(index, tokens, is_last=following is None)
            index = following

    def _read_ahead(self, wanted: Sequence[Key]) -> None:
        for key in self._ahead.keys() - set(wanted):
            self._ahead.pop(key).cancel()
        for key in wanted:
            if key not in self._ahead:
                self._ahead[key] = self._thread.submit(self.microbatch, *key)

    def close(self) -> None:
        """Waits for the thread to end, and closes the shards."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()
        self.shards.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def validation_loader(shards: ShardSet, seq_len: int, microbatch: int, num_sequences: int) -> Loader:
    """The loader of the fixed validation sequences: those of its step 0, the same in every run.

    They are spread over the split, at most `num_sequences` and at most as many as there are, in whole microbatches.

    Raises:
        DataError: The split does not fill one microbatch.
    """
    order = SampleOrder(shards.num_tokens_per_shard, seq_len, _VALIDATION_SEED)
    num_microbatches = min(num_sequences, order.num_samples) // microbatch
    if num_microbatches == 0:
        raise DataError(
            f"validation does not fill one microbatch of {microbatch} sequences: the {shards.split} split of "
            f"{shards.folder} holds {order.num_samples} of {seq_len} tokens, and {num_sequences} are asked for. Use "
            "smaller microbatches or shorter sequences, or pack more text"
        )
    return Loader(shards, order, microbatch, num_microbatches)
