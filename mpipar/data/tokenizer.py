"""The tokenizer of a data set: byte-level BPE, trained here or given by the user, and its identity.

The file is `tokenizer.json` of Hugging Face's `tokenizers`, and its identity the SHA-256 of that file: every shard
names the tokenizer that made it, so shards and vocabularies cannot be mixed up. Training is deterministic: the same
texts in the same order give the same file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from mpipar.data.words import WordEncoder
from mpipar.errors import DataError

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 260  # 256 bytes, the end of text, and something to learn

_BYTE = re.compile("<0x[0-9A-F]{2}>")  # of tokenizers in the manner of sentencepiece

# What other families call the token between documents.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>")


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        vocab_size: One more than the largest id.
        end_of_text: The id of the token that ends every document.
        added_tokens: The ids of the tokens that are no pieces of text, but stand for something by their names.
        identity: The SHA-256 of `text`, in hexadecimal.
        text: The content of tokenizer.json.
    """

    def __init__(self, text: str, name: str = "tokenizer.json"):
        """Reads the content of a tokenizer.json.

        Raises:
            DataError: The text is no tokenizer, or none that knows an end of text.
        """
        try:
            self._backend = Backend.from_str(text)
        except Exception as error:  # the binding raises Exception itself
            raise DataError(f"{name} is not a tokenizer that the `tokenizers` library can read: {error}") from error
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        ends = [vocabulary[token] for token in _END_OF_TEXT_NAMES if token in vocabulary]
        if not ends:
            raise DataError(f"{name} has no token that ends a text: none of {', '.join(_END_OF_TEXT_NAMES)}")
        self.end_of_text = ends[0]
        self.added_tokens = frozenset(self._backend.get_added_tokens_decoder())
        self.vocab_size = max(vocabulary.values()) + 1
        self.text = text
        self.identity = identity(text.encode("utf-8"))
        # A document is data: names of special tokens in it are only letters, and it is never cut or filled up.
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()

    @cached_property
    def _words(self) -> WordEncoder | None:
        """Made when something is encoded: a run reads a tokenizer only to decode."""
        return WordEncoder(self.text, self._encode_word) if WordEncoder.suits(self.text) else None

    def encode(self, documents: Sequence[bytes]) -> list[NDArray[np.uint32]]:
        """The ids of each document, which is UTF-8, with an end of text after them."""
        if self._words is not None:
            return [self._words.encode(document, self.end_of_text) for document in documents]
        texts = [document.decode("utf-8") for document in documents]
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([*encoding.ids, self.end_of_text], np.uint32) for encoding in encodings]

    def encode_marked(self, text: str) -> NDArray[np.uint32]:
        """The ids of a text in which names of special tokens are those tokens. Not for what others wrote."""
        self._backend.encode_special_tokens = False
        try:
            return np.array(self._backend.encode(text, add_special_tokens=False).ids, np.uint32)
        finally:
            self._backend.encode_special_tokens = True

    def _encode_word(self, word: str) -> list[int]:
        ids: list[int] = self._backend.encode(word, add_special_tokens=False).ids
        return ids

    def text_bytes(self) -> NDArray[np.int64]:
        """How many bytes of text each id stands for: [vocab_size]. Exact for byte-level BPE; 0 for special tokens."""
        content = json.loads(self.text)
        byte_level = "ByteLevel" in json.dumps(content.get("decoder"))
        special = {token["content"] for token in content.get("added_tokens") or [] if token.get("special")}
        sizes = np.zeros(self.vocab_size, np.int64)
        for token, number in self._backend.get_vocab(with_added_tokens=True).items():
            if token in special:
                continue
            if byte_level:
                sizes[number] = len(token)  # a letter for every byte
            elif _BYTE.fullmatch(token):
                sizes[number] = 1
            else:
                sizes[number] = len(token.replace("\u2581", " ").encode("utf-8"))
        return sizes

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a row of ids. Bytes that are no UTF-8 become U+FFFD; ends of text stay visible."""
        return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=False))


def train(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE. Where there is too little text for `vocab_size` tokens, it has fewer."""
    assert vocab_size >= MIN_VOCAB_SIZE
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    return Tokenizer(backend.to_str(pretty=True))


def load(path: Path) -> Tokenizer:
    """Reads a tokenizer.json.

    Raises:
        DataError: There is no such file, or it is no tokenizer.
    """
    try:
        return Tokenizer(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a tokenizer: it is not UTF-8 text") from error
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {path}: {error.strerror}") from error


def identity(content: bytes) -> str:
    """What a shard calls the tokenizer whose file has this content."""
    return hashlib.sha256(content).hexdigest()


def limit_threads(num_threads: int) -> None:
    """Keeps the library's thread pool within the cores of this rank, whatever the user set before excepted.

    The pool reads these variables when it is first used. That TOKENIZERS_PARALLELISM is set at all also tells the
    library that a later fork is no surprise.
    """
    os.environ.setdefault("RAYON_NUM_THREADS", str(num_threads))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if num_threads > 1 else "false")
