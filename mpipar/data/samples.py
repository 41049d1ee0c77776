"""The samples of a run, numbered through: from a global index to tokens.

    mix      index -> source, sample of that source
    order    sample -> shard, offset
    shards   shard, offset -> tokens

All of it is computed, so a run has no state but the number of samples that it has seen, and whoever asks, at whatever
rank count, gets the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpipar.data.mix import Mixture
from mpipar.data.order import SampleOrder
from mpipar.data.shards import ShardSet, Tokens
from mpipar.errors import DataError


class Sequences(NamedTuple):
    """Sequences of T predictions each: what `Transformer.loss` takes."""

    tokens: Tensor
    """int64 [B, T + 1]."""
    begins: Tensor | None
    """bool [B, T], which tokens begin a document, at which attention and positions begin anew; None if none does."""
    counted: Tensor | None
    """bool [B, T], of which tokens the prediction of the next one counts; None if all do."""

    def pinned(self) -> Sequences:
        """A copy in memory that the system does not move, from which a GPU reads while the processor goes on."""
        begins, counted = (x if x is None else x.pin_memory() for x in (self.begins, self.counted))
        return Sequences(self.tokens.pin_memory(), begins, counted)

    def on(self, device: torch.device) -> Sequences:
        """On a device; from pinned memory nobody waits for the copy."""
        begins, counted = (x if x is None else x.to(device, non_blocking=True) for x in (self.begins, self.counted))
        return Sequences(self.tokens.to(device, non_blocking=True), begins, counted)


class Samples:
    """The samples of one or several data sets.

    Args:
        sources: Data sets of one tokenizer. Closed with the samples.
        seq_len: The number of tokens that a sample predicts, T.
        seed: Chooses the order within each source.
        weights: Of the sources; if none are given, each has as much as it has samples.
        epochs: How often each source is read before it ends; 0 for no end. Empty: none ends.
        end_of_text: The token that stands between documents, where they are to be kept apart: read as input, it begins
            the document after it. None if documents are joined.

    Attributes:
        num_samples: In all sources, each once.
        mixture: Which sample is of which source.

    Raises:
        DataError: The sources are of several tokenizers, or one has nothing to predict.
    """

    def __init__(
        self,
        sources: Sequence[ShardSet],
        seq_len: int,
        seed: int,
        *,
        weights: Sequence[float] = (),
        epochs: Sequence[int] = (),
        end_of_text: int | None = None,
    ):
        _require_one_tokenizer(sources)
        self.sources = tuple(sources)
        self.seq_len = seq_len
        self.orders = [_order(source, seq_len, seed + number) for number, source in enumerate(sources)]
        sizes = [order.num_samples for order in self.orders]
        self.num_samples = sum(sizes)
        limits = [size * passes or None for size, passes in zip(sizes, epochs or [0] * len(sizes), strict=True)]
        self.mixture = Mixture(weights or sizes, limits)
        self._end_of_text = end_of_text

    def read(self, first: int, count: int) -> Sequences:
        """The samples first..first + count.

        Raises:
            DataError: A shard is damaged where it was read.
        """
        stored = np.zeros((count, self.seq_len + 1), self.sources[0].dtype)
        counts = np.zeros(stored.shape, np.bool_)
        places = zip(*self.locate(first, count), strict=True)
        for row, (source, shard, offset) in enumerate(places):
            self._read_into(stored[row], counts[row], source, shard, offset)
        tokens = torch.from_numpy(stored.astype(np.int64))
        begins = counted = None
        if self._end_of_text is not None:
            begins = tokens[:, :-1] == self._end_of_text
        if not counts[:, 1:].all():
            counted = torch.from_numpy(counts[:, 1:].copy())
        return Sequences(tokens, begins, counted)

    def locate(self, first: int, count: int) -> tuple[list[int], list[int], list[int]]:
        """(source, shard, offset of the first token) of the samples first..first + count."""
        source, position = self.mixture.locate(np.arange(first, first + count))
        shard, offset = np.empty_like(source), np.empty_like(source)
        for number in np.unique(source).tolist():
            mine = source == number
            shard[mine], offset[mine] = self.orders[number].locate(position[mine])
        return source.tolist(), shard.tolist(), offset.tolist()

    def _read_into(self, row: Tokens, counts: NDArray[np.bool_], source: int, shard: int, offset: int) -> None:
        """Fills a row with the tokens there, and whether they count, as far as the shard has any."""
        shards = self.sources[source]
        length = min(row.size, shards.shards[shard].num_tokens - offset)
        shards.tokens[shard].read_into(offset, row[:length])
        counts[:length] = shards.read_counted(shard, offset, length)

    def close(self) -> None:
        for source in self.sources:
            source.close()


def _order(source: ShardSet, seq_len: int, seed: int) -> SampleOrder:
    try:
        return SampleOrder(source.num_tokens_per_shard, seq_len, seed)
    except DataError as error:
        raise DataError(f"{source.folder}: {error}") from error


def _require_one_tokenizer(sources: Sequence[ShardSet]) -> None:
    first = sources[0]
    for source in sources:
        if source.tokenizer_id != first.tokenizer_id:
            raise DataError(
                f"{source.folder} was packed with another tokenizer ({source.tokenizer_id[:12]}) than {first.folder} "
                f"({first.tokenizer_id[:12]}), and one run has one: pack it again with --tokenizer "
                f"{first.folder}/tokenizer.json"
            )
