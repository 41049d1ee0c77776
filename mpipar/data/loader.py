"""Microbatches, prepared while the last one computes.

Microbatch i of step s holds the sequences s * global_batch + i * microbatch ... of the global order, whoever asks for
it: a loader has no state but what it has read ahead, and a step may be taken up anywhere, by any rank.

One background thread reads and converts what comes next; for a GPU it leaves it in pinned memory, from which the copy
to the device is only begun where the batch is asked for. It makes no MPI call. What goes wrong in it is raised where
its batch is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import torch

from mpipar.data.samples import Samples, Sequences
from mpipar.errors import DataError

Key = tuple[int, int]  # step, index of the microbatch

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Microbatch:
    """One of the microbatches of a step.

    Args:
        index: In the step.
        sequences: Its B sequences.
        is_last: Whether this rank has no more of the step.
    """

    index: int
    sequences: Sequences
    is_last: bool


class Loader:
    """The microbatches of all steps.

    Args:
        samples: What they are made of. Closed with the loader.
        microbatch: Sequences in a microbatch, B.
        num_microbatches: Microbatches in a step.
        device: Where they are wanted.
    """

    def __init__(self, samples: Samples, microbatch: int, num_microbatches: int, device: torch.device = _CPU):
        self.samples = samples
        self.num_microbatches = num_microbatches
        self._microbatch = microbatch
        self._device = device
        # Which GPU is the current one is each thread's own, and the first use of another would cost memory on it.
        begin = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mpipar-loader", initializer=begin)
        self._ahead: dict[Key, Future[Sequences]] = {}

    def microbatch(self, step: int, index: int) -> Sequences:
        """The sequences of one microbatch. Pure.

        Raises:
            DataError: A shard is damaged where it was read.
        """
        return self._read(step, index).on(self._device)

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
            sequences = batch.result() if batch else self._read(step, index)
            yield Microbatch(index, sequences.on(self._device), is_last=following is None)
            index = following

    def _read_ahead(self, wanted: Sequence[Key]) -> None:
        for key in self._ahead.keys() - set(wanted):
            self._ahead.pop(key).cancel()
        for key in wanted:
            if key not in self._ahead:
                self._ahead[key] = self._thread.submit(self._read, *key)

    def _read(self, step: int, index: int) -> Sequences:
        """In the host's memory."""
        read = self.samples.read((step * self.num_microbatches + index) * self._microbatch, self._microbatch)
        return read.pinned() if self._device.type == "cuda" else read

    def close(self) -> None:
        """Waits for the thread to end, and closes the samples."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()
        self.samples.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def validation_loader(samples: Samples, microbatch: int, num_sequences: int, device: torch.device = _CPU) -> Loader:
    """The loader of the fixed validation sequences: those of its step 0, the same in every run.

    They are the first of the samples, at most `num_sequences` and at most as many as there are, in whole microbatches.

    Raises:
        DataError: The samples do not fill one microbatch.
    """
    num_microbatches = min(num_sequences, samples.num_samples) // microbatch
    if num_microbatches == 0:
        folders = ", ".join(str(source.folder) for source in samples.sources)
        raise DataError(
            f"validation does not fill one microbatch of {microbatch} sequences: the val split of {folders} holds "
            f"{samples.num_samples} of {samples.seq_len} tokens, and {num_sequences} are asked for. Use smaller "
            "microbatches or shorter sequences, or pack more text"
        )
    return Loader(samples, microbatch, num_microbatches, device)
