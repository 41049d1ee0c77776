"""The order in which training reads its samples: a pure function of (seed, epoch, index), in O(1) memory.

A sample is a window of seq_len + 1 tokens of one shard; window i starts at token i * seq_len, so that neighbouring
windows share one token, and every token but the first of a shard is predicted once an epoch. The last window of a shard
is as short as what is left. All windows of all shards, numbered through, are visited in the order of a keyed
permutation of [0, num_samples): each is seen once before any is seen twice, and with them the documents. Nothing is
stored, so there is no state to save but the step number, and every rank, at every rank count, computes the same global
order.

The permutation is a Feistel network over Z_rows x Z_columns, a rectangle that just holds the samples, with cycle
walking for the cells beyond them (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). Such a
rectangle, unlike a power of two, is never more than a third larger than its content, and it mixes sets of two or three
samples as well as billions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import isqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpipar.errors import DataError

_ROUNDS = 8
_MAX_SAMPLES = 1 << 60

# Arrays of one element: numpy's scalars warn of the overflow that arithmetic modulo 2^64 is made of, and are slower.
_HALF = np.array([32], np.uint64)
_MULTIPLIER = np.array([0xD6E8FEB86659FD93], np.uint64)


class SampleOrder:
    """Where the sample with a given global index lies.

    Args:
        num_tokens_per_shard: The length of every shard, in the shards' own order.
        seq_len: The number of tokens that a sample predicts; it reads one more.
        seed: Chooses the permutations. Each epoch has one of its own.

    Raises:
        DataError: No shard has a token to predict.
    """

    def __init__(self, num_tokens_per_shard: Sequence[int], seq_len: int, seed: int):
        num_windows = [-(-max(0, num_tokens - 1) // seq_len) for num_tokens in num_tokens_per_shard]
        self.seq_len = seq_len
        self.num_samples = sum(num_windows)
        if self.num_samples == 0:
            raise DataError("there is no token to predict: no shard has more than one. Pack more text")
        self._first_sample = np.concatenate([[0], np.cumsum(num_windows[:-1], dtype=np.int64)]).astype(np.int64)
        self._permutation = KeyedPermutation(self.num_samples, seed)

    def locate(self, index: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns (shard, offset of the first token) of the samples with these global indices, each shaped as `index`.

        Indices run on through the epochs: sample g is sample g % num_samples of epoch g // num_samples.
        """
        flat = np.asarray(index, dtype=np.int64)
        shape = flat.shape
        flat = flat.reshape(-1)
        if flat.size and flat.min() < 0:
            raise ValueError(f"a sample's index counts from 0, got {flat.min()}")
        epoch, position = np.divmod(flat, self.num_samples)
        sample = self._permutation(position.view(np.uint64), epoch.view(np.uint64)).view(np.int64)
        # side="right" steps over shards without samples: they begin where the next one does.
        shard = self._first_sample.searchsorted(sample, side="right") - 1
        offset = (sample - self._first_sample[shard]) * self.seq_len
        return shard.reshape(shape), offset.reshape(shape)


class KeyedPermutation:
    """A bijection of [0, size) for every (seed, epoch), computed index by index."""

    def __init__(self, size: int, seed: int):
        if not 0 < size <= _MAX_SAMPLES:
            raise ValueError(f"a permutation of {size} elements; it can have from 1 to {_MAX_SAMPLES}")
        rows = isqrt(size - 1) + 1
        self._size = np.array([size], np.uint64)
        self._rows = np.array([rows], np.uint64)
        self._columns = np.array([-(-size // rows)], np.uint64)
        digest = hashlib.shake_128(f"mpipar sample order, seed {seed}".encode()).digest(8 * (_ROUNDS + 1))
        keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64) | np.uint64(1)
        self._epoch_key, *self._round_keys = np.split(keys, _ROUNDS + 1)

    def __call__(self, index: NDArray[np.uint64], epoch: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Maps the indices [n] of epochs [n]."""
        epoch_key = (epoch + self._epoch_key) * self._epoch_key
        epoch_key = (epoch_key ^ (epoch_key >> _HALF)) * _MULTIPLIER
        image = self._walk(index, epoch_key)
        while (outside := image >= self._size).any():
            image[outside] = self._walk(image[outside], epoch_key[outside])
        return image

    def _walk(self, index: NDArray[np.uint64], epoch_key: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """One pass of the network over the whole rectangle."""
        row, column = np.divmod(index, self._columns)
        for even, odd in zip(self._round_keys[0::2], self._round_keys[1::2], strict=True):
            row = (row + _hash((column + epoch_key) * even)) % self._rows
            column = (column + _hash((row + epoch_key) * odd)) % self._columns
        return row * self._columns + column


def _hash(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """32 bits of which each depends on all bits of x, if x is a product with an odd key: fold, multiply, shift."""
    return ((x ^ (x >> _HALF)) * _MULTIPLIER) >> _HALF
