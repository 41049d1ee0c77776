"""Byte-level BPE that remembers words.

Byte-level BPE cuts a text into words by a pattern and encodes each by itself, so a word has the same ids wherever it
stands. Text repeats its words: of ten million, one in a hundred is new. Finding words, looking them up, and merging
(`merges`) those that are new is in C (words.c); what is left for the tokenizer are new words that are not ASCII.
Without a compiler where mpipar was installed, it does all of it.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from mpipar import compiled
from mpipar.data.merges import Merges

_NUM_SLOTS = 1 << 19
_WORDS_BYTES = 8 << 20
_NUM_IDS = 2 << 20
_LONGEST_WORD_BYTES = 256  # longer ones are hardly seen again

Ids = NDArray[np.uint32]


class _Table(ctypes.Structure):
    """As in words.c."""

    _fields_ = [
        ("slots", ctypes.c_void_p),
        ("num_slots", ctypes.c_uint64),
        ("words", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("words_bytes", ctypes.c_uint64),
        ("num_ids", ctypes.c_uint64),
        ("used_slots", ctypes.c_uint64),
        ("used_bytes", ctypes.c_uint64),
        ("used_ids", ctypes.c_uint64),
    ]


class WordEncoder:
    """Encodes by remembering. In bounded memory, about 30 MB.

    Args:
        tokenizer: Content of a tokenizer.json; `suits`.
        encode_word: The ids of a word that has not been seen, and cannot be merged.
    """

    def __init__(self, tokenizer: str, encode_word: Callable[[str], Sequence[int]]):
        functions = _functions()
        assert functions is not None
        self._encode, self._remember = functions
        self._encode_word = encode_word
        model = json.loads(tokenizer)["model"]
        self._merges = Merges(model) if Merges.suits(model) else None
        self._slots = np.zeros(_NUM_SLOTS * 3, np.uint64)
        self._words = np.empty(_WORDS_BYTES, np.uint8)
        self._ids = np.empty(_NUM_IDS, np.uint32)
        self._table = _Table(
            self._slots.ctypes.data,
            _NUM_SLOTS,
            self._words.ctypes.data,
            self._ids.ctypes.data,
            self._words.size,
            self._ids.size,
        )

    @staticmethod
    def suits(tokenizer: str) -> bool:
        """Whether words of this tokenizer.json can be encoded one by one: byte-level BPE with GPT-2's pattern."""
        if _functions() is None:
            return False
        content = json.loads(tokenizer)
        cutter = content.get("pre_tokenizer") or {}
        model = content.get("model") or {}
        return (
            cutter.get("type") == "ByteLevel"
            and not cutter.get("add_prefix_space")
            and cutter.get("use_regex", True)
            and not content.get("normalizer")
            and model.get("type") == "BPE"
            and not model.get("dropout")
            and all(token.get("special") for token in content.get("added_tokens") or [])
        )

    def encode(self, document: bytes, end_of_text: int) -> Ids:
        """The ids of a document, which is UTF-8, and an end of text after them."""
        ids: Ids = np.empty(len(document) + 1, np.uint32)  # a token is a byte at least
        at, num_ids = ctypes.c_int64(0), ctypes.c_int64(0)
        table = ctypes.byref(self._table)
        place, counter = ctypes.byref(at), ctypes.byref(num_ids)
        merges = None if self._merges is None else self._merges.pointer
        room = len(document)
        while size := self._encode(table, merges, document, room, place, ids.ctypes.data, room, counter):
            word = document[at.value : at.value + size]
            new = np.array(self._encode_word(word.decode("utf-8")), np.uint32)
            if size <= _LONGEST_WORD_BYTES:
                self._remember(table, word, size, new.ctypes.data, new.size)
            ids[num_ids.value : num_ids.value + new.size] = new
            at.value += size
            num_ids.value += new.size
        ids[num_ids.value] = end_of_text
        encoded: Ids = ids[: num_ids.value + 1].copy()
        return encoded


def _functions() -> tuple[Callable[..., int], Callable[..., None]] | None:
    """(encode, remember) of words.c, if it was built."""
    pointer, table = ctypes.c_void_p, ctypes.POINTER(_Table)
    counter = ctypes.POINTER(ctypes.c_int64)
    encode = compiled.function(
        "encode",
        ctypes.c_int64,
        table,
        pointer,
        ctypes.c_char_p,
        ctypes.c_int64,
        counter,
        pointer,
        ctypes.c_int64,
        counter,
    )
    remember = compiled.function("remember", None, table, ctypes.c_char_p, ctypes.c_int64, pointer, ctypes.c_int64)
    return None if encode is None or remember is None else (encode, remember)
