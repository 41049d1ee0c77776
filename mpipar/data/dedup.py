"""Near-duplicate documents, found by MinHash sketches and banding.

The shingles of a document are its runs of five words. One hash of every shingle says into which of 144 bins it falls
and with what value; a bin keeps its minimum (one permutation hashing: Li, Owen and Zhang, NIPS 2012), and an empty bin
borrows from the next full one (Shrivastava and Li, "Densifying one permutation hashing via rotation", ICML 2014). Two
documents agree in a bin with a probability that is the Jaccard similarity s of their shingles.

24 bands of 6 bins each make the 24 keys of a document's sketch. Documents that share a key are taken for
near-duplicates, which happens with probability 1 - (1 - s^6)^24: 2 % at s = 0.3, 31 % at 0.5, 99.9 % at 0.8.

Everything is arithmetic modulo 2^64: on whole batches of documents here, document by document in sketch.c, to the same
bits, where that was compiled.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mpipar import compiled

NUM_BANDS = 24

_BINS_PER_BAND = 6
_NUM_BINS = NUM_BANDS * _BINS_PER_BAND
_SHINGLE_WORDS = 5
_LONGEST_WORD = 256  # letters beyond it all count alike

_EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)


def _random_words(name: str, count: int) -> NDArray[np.uint64]:
    """Odd constants that look random and never change."""
    digest = hashlib.shake_128(name.encode()).digest(8 * count)
    words: NDArray[np.uint64] = np.frombuffer(digest, dtype="<u8").astype(np.uint64) | np.uint64(1)
    return words


_LETTERS = _random_words("letters", 256)
_POSITIONS = _random_words("positions in a word", _LONGEST_WORD)
_SHINGLE = _random_words("words of a shingle", _SHINGLE_WORDS)
_BAND = _random_words("bins of a band", _BINS_PER_BAND)
_ROTATION = _random_words("borrowed bins", 1)[0]

# A word is a run of ASCII letters, digits and underscores, and of all that is not ASCII.
_IS_LETTER = np.array([chr(byte).isalnum() or byte == ord("_") or byte >= 128 for byte in range(256)])


class _Constants(ctypes.Structure):
    """As in sketch.c."""

    _fields_ = [
        ("letters", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("shingle", ctypes.c_void_p),
        ("num_positions", ctypes.c_uint64),
        ("num_bins", ctypes.c_uint64),
    ]


_LETTERS_ONLY = _LETTERS * _IS_LETTER
_CONSTANTS = _Constants(
    _LETTERS_ONLY.ctypes.data, _POSITIONS.ctypes.data, _SHINGLE.ctypes.data, _LONGEST_WORD, _NUM_BINS
)


def content_hash(document: bytes) -> int:
    """64 bits that stand for the document."""
    return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "little")


def sketch(documents: Sequence[bytes]) -> NDArray[np.uint64]:
    """The sketches [num_documents, NUM_BANDS] of a batch of documents."""
    function = _compiled()
    bins = _bins(documents) if function is None else _bins_in_c(function, documents)
    keys = _densified(bins).reshape(len(documents), NUM_BANDS, _BINS_PER_BAND)
    return _mix((_mix(keys) * _BAND).sum(axis=2, dtype=np.uint64))


def count_sharing(candidates: NDArray[np.uint64], sketches: NDArray[np.uint64]) -> NDArray[np.int64]:
    """How many of the sketches [n, NUM_BANDS] share each key of the candidates [c, NUM_BANDS]: [c, NUM_BANDS]."""
    counts = np.empty(candidates.shape, np.int64)
    for band in range(NUM_BANDS):
        keys = np.sort(sketches[:, band])
        wanted = candidates[:, band]
        counts[:, band] = np.searchsorted(keys, wanted, side="right") - np.searchsorted(keys, wanted, side="left")
    return counts


def _bins(documents: Sequence[bytes]) -> NDArray[np.uint64]:
    """The bins [num_documents, _NUM_BINS] with the least hash of the shingles that fall into each; _EMPTY with none."""
    shingles, owner = _shingles(documents)
    shingles = _mix(shingles)
    bins = np.full((len(documents), _NUM_BINS), _EMPTY)
    slot = ((shingles >> _HALF) * np.uint64(_NUM_BINS) >> _HALF).astype(np.int64)
    np.minimum.at(bins.reshape(-1), owner * _NUM_BINS + slot, _mix(shingles))
    return bins


def _bins_in_c(function: Callable[..., int], documents: Sequence[bytes]) -> NDArray[np.uint64]:
    """Likewise, ten times as fast."""
    bins = np.full((len(documents), _NUM_BINS), _EMPTY)
    row = bins.ctypes.data
    for i, document in enumerate(documents):
        if not function(_CONSTANTS, document, len(document), row + i * bins.strides[0]):
            bins[i] = _bins([document])
    return bins


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., int] | None:
    """mpipar_bins of sketch.c, if it was built."""
    types = ctypes.POINTER(_Constants), ctypes.c_char_p, ctypes.c_int64, ctypes.c_void_p
    return compiled.function("bins", ctypes.c_int64, *types)


def _shingles(documents: Sequence[bytes]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The hash of every shingle, and the document that it is of. Every document has at least one."""
    words, owner = _words(documents)
    # A document without words stands for itself: it resembles its exact copies only.
    wordless = np.setdiff1d(np.arange(len(documents)), owner)
    alone = np.array([content_hash(documents[i]) for i in wordless], np.uint64)

    num_words = len(words)
    padded_words = np.append(words, np.zeros(_SHINGLE_WORDS, np.uint64))
    padded_owner = np.append(owner, np.full(_SHINGLE_WORDS, -1))
    hashes = np.zeros(num_words, np.uint64)
    for i in range(_SHINGLE_WORDS):
        in_document = padded_owner[i : i + num_words] == owner
        hashes += padded_words[i : i + num_words] * _SHINGLE[i] * in_document
    # The last round has left those words of which a whole shingle begins. A shorter document has one, of all its words.
    kept = in_document | (np.diff(owner, prepend=-1) > 0)
    return np.concatenate([hashes[kept], alone]), np.concatenate([owner[kept], wordless])


def _words(documents: Sequence[bytes]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The hash of every word, and the document that it is of."""
    letters = np.frombuffer(b"\0".join(documents), np.uint8)
    at = np.flatnonzero(_IS_LETTER[letters])  # places of letters
    is_start = np.diff(at, prepend=-2) > 1
    first = np.flatnonzero(is_start)  # of each word, among the letters
    if not first.size:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    position = np.minimum(np.arange(at.size) - np.repeat(first, np.diff(first, append=at.size)), _LONGEST_WORD - 1)
    hashes = np.add.reduceat(_mix(_LETTERS[letters[at]] * _POSITIONS[position]), first)
    begins = np.cumsum([0] + [len(document) + 1 for document in documents[:-1]])
    return _mix(hashes), np.searchsorted(begins, at[first], side="right") - 1


def _densified(bins: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Empty bins [n, _NUM_BINS] filled from the next full one, round the end, marked with the distance."""
    full = np.concatenate([bins, bins], axis=1) != _EMPTY
    place = np.arange(2 * _NUM_BINS)
    source = np.where(full, place, 2 * _NUM_BINS)
    source = np.minimum.accumulate(source[:, ::-1], axis=1)[:, ::-1][:, :_NUM_BINS]
    distance = (source - place[:_NUM_BINS]).astype(np.uint64)
    filled: NDArray[np.uint64] = np.take_along_axis(bins, source % _NUM_BINS, axis=1) + distance * _ROTATION
    return filled


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64 bits under which the upper half depends on everything."""
    for _ in range(2):
        x = (x ^ (x >> _HALF)) * _MULTIPLIER
    return x
