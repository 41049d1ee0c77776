"""Megatron's files: what was written is read, and what is damaged is told."""

from __future__ import annotations

from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpipar.data.megatron import MegatronTokens
from mpipar.errors import DataError
from tests.megatron_files import CODES, write_megatron

DOCUMENTS = st.lists(st.lists(st.lists(st.integers(0, 127), max_size=6), max_size=3), min_size=1, max_size=12)


@given(documents=DOCUMENTS, dtype=st.sampled_from(sorted(CODES)), cuts=st.lists(st.integers(0, 11), max_size=3))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[list[int]]], dtype: str, cuts: list[int]
) -> None:
    prefix = tmp_path_factory.mktemp("megatron") / "tokens"
    documents = [*documents, [[1]]]  # one sequence at least
    write_megatron(prefix, documents, dtype)
    read = MegatronTokens(prefix)
    read.check()
    assert (read.num_documents, read.dtype) == (len(documents), np.dtype(dtype))
    bounds = sorted({0, len(documents), *(cut % len(documents) for cut in cuts)})
    found = []
    for start, stop in pairwise(bounds):
        tokens, begins = read.read(start, stop)
        found += [part.tolist() for part in np.split(tokens, begins[1:-1])]
        assert (begins[0], begins[-1]) == (0, tokens.size)
    assert found == [list(chain(*document)) for document in documents]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write_megatron(tmp_path / "tokens", [[[1, 2, 3], [4]], [[5, 6]], [[7]]])
    return tmp_path / "tokens"


def patch(path: Path, offset: int, content: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[offset : offset + len(content)] = content
    path.write_bytes(whole)


# header 34 bytes; lengths from 34, beginnings from 50, documents from 82 to 114
@pytest.mark.parametrize(
    ("offset", "content", "reason"),
    [
        (0, b"TNTIDX\0\0\0", r"tokens\.idx begins with b'TNTIDX.*and not with b'MMIDIDX"),
        (9, b"\2", "has version 2, where 1 is known"),
        (17, b"\7", "has tokens of dtype 7, where 1, 2, 3, 4, 5, 8 are known"),
        (18, b"\5", "is 114 bytes long, where its header says 126"),
        (18, bytes(8), "holds no documents"),
        (34, b"\xff\xff\xff\xff", "has a sequence of negative length"),
        (58, b"\7", "has sequence 1 not where the one before ends"),
        (82, b"\1", "has documents of 4 sequences, where there are 4"),
        (98, b"\1", "has documents that are not in order"),
        (106, b"\3", "has documents of 3 sequences, where there are 4"),
    ],
)
def test_a_damaged_index(prefix: Path, offset: int, content: bytes, reason: str) -> None:
    patch(Path(f"{prefix}.idx"), offset, content)
    with pytest.raises(DataError, match=reason):
        MegatronTokens(prefix).check()


def test_truncated_files(prefix: Path) -> None:
    tokens, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-2])
    with pytest.raises(DataError, match=r"tokens\.bin is 12 bytes long, where tokens\.idx says 14: it was truncated"):
        MegatronTokens(prefix).check()
    tokens.write_bytes(whole)
    opened = MegatronTokens(prefix)
    tokens.write_bytes(whole[:-2])
    with pytest.raises(DataError, match=r"tokens\.bin ends before document 3: it was truncated meanwhile"):
        opened.read(1, 3)
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(DataError, match="is 113 bytes long, where its header says 114"):
        MegatronTokens(prefix)
    index.write_bytes(b"MMID")
    with pytest.raises(DataError, match="begins with b'MMID'"):
        MegatronTokens(prefix)
    tokens.unlink()
    with pytest.raises(DataError, match=r"tokens\.bin: No such file or directory\. PREFIX stands for"):
        MegatronTokens(prefix)


def test_several_media(prefix: Path) -> None:
    index = Path(f"{prefix}.idx")
    index.write_bytes(index.read_bytes() + bytes(4))
    with pytest.raises(DataError, match="with modes of several media"):
        MegatronTokens(prefix)
