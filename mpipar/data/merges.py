"""The merges of byte-level BPE, for words.c: new words then need not be asked of the tokenizer, one call each.

A word begins as the tokens of its bytes. Of all pairs of neighbours the one with the lowest rank becomes one token, the
first of them if there are several, until no pair is left that has a rank (Sennrich, Haddow and Birch, ACL 2016).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mpipar import compiled


class _Table(ctypes.Structure):
    """As in words.c."""

    _fields_ = [("slots", ctypes.c_void_p), ("num_slots", ctypes.c_uint64), ("bytes", ctypes.c_void_p)]


class Merges:
    """The merges of a model, in a table of 32 to 64 bytes each.

    Args:
        model: Of a tokenizer.json; `suits`.

    Attributes:
        pointer: To the struct merges.
    """

    def __init__(self, model: Mapping[str, Any]):
        learn = _learn()
        assert learn is not None
        ids = model["vocab"]
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        pairs = np.array([[ids[left], ids[right]] for left, right in merges], np.uint32).reshape(-1, 2)
        become = np.array([ids[left + right] for left, right in merges], np.uint32)
        self._bytes = np.array([ids[letter] for letter in _LETTERS], np.uint32)
        num_slots = 2 << len(merges).bit_length()
        self._slots = np.zeros(2 * num_slots, np.uint64)
        self._table = _Table(self._slots.ctypes.data, num_slots, self._bytes.ctypes.data)
        self.pointer = ctypes.byref(self._table)
        learn(self.pointer, pairs.ctypes.data, become.ctypes.data, len(merges))

    @staticmethod
    def suits(model: Mapping[str, Any]) -> bool:
        """Whether merges are all there is to the model, and it knows every byte."""
        plain = not any(
            model.get(name)
            for name in ("dropout", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        )
        return plain and all(letter in model["vocab"] for letter in _LETTERS)


def _letters() -> list[str]:
    """What stands for each byte in tokens: itself where it can be seen, otherwise a letter from U+0100 on."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]


_LETTERS = _letters()


def _learn() -> Callable[..., None] | None:
    pointer = ctypes.c_void_p
    return compiled.function("learn", None, ctypes.POINTER(_Table), pointer, pointer, ctypes.c_int64)
