"""From inputs to documents: every record exactly once, and what cannot be read named."""

from __future__ import annotations

import gzip
import json
import os
import stat
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpipar.data.corpus import Piece, SourceFile, cut, list_files
from mpipar.data.documents import LONGEST_RECORD_BYTES, read_documents
from mpipar.data.skipped import Reason, Skip, Tally
from mpipar.errors import ConfigError, DataError

NOWHERE = Path("/nowhere")


class Noting(Tally):
    """Remembers what is skipped, by record number in the file."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[int | None, Reason, str]] = []

    def skip(self, record: int | None, reason: Reason, detail: str) -> None:
        self.noted.append((record, reason, detail))


def listed(*inputs: Path | str, skipped: list[Skip] | None = None, exclude: Path = NOWHERE) -> list[SourceFile]:
    return list_files([str(item) for item in inputs], exclude, [] if skipped is None else skipped)


def pieces_of(*inputs: Path | str, text_field: str = "text", skipped: list[Skip] | None = None) -> list[Piece]:
    skipped = [] if skipped is None else skipped
    return cut(listed(*inputs, skipped=skipped), text_field, skipped)


def documents(*inputs: Path | str, tally: Tally | None = None) -> list[str]:
    tally = tally or Tally()
    return [document.decode() for piece in pieces_of(*inputs) for document in read_documents(piece, "text", tally)]


def pieces_at(path: Path, cuts: list[int]) -> list[Piece]:
    file = listed(path)[0]
    bounds = sorted({0, file.num_bytes, *(at % file.num_bytes for at in cuts)})
    return [Piece(file, start, stop, stop - start, 1 << 20) for start, stop in pairwise(bounds)]


# Cutting

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@given(
    records=st.lists(TEXTS, min_size=1, max_size=30),
    cuts=st.lists(st.integers(0, 10**6), max_size=12),
    end=st.sampled_from(["", "\n", "\n\n \n"]),
    ascii_only=st.booleans(),
)
def test_jsonl_cut_anywhere_gives_each_record_once(
    tmp_path_factory: pytest.TempPathFactory, records: list[str], cuts: list[int], end: str, ascii_only: bool
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    lines = (json.dumps({"n": n, "text": f"{n}:{text}"}, ensure_ascii=ascii_only) for n, text in enumerate(records))
    path.write_bytes(("\n".join(lines) + end).encode())
    tally = Noting()  # one for all pieces: it numbers the lines of the file
    read = [document.decode() for piece in pieces_at(path, cuts) for document in read_documents(piece, "text", tally)]
    assert read == [f"{n}:{text}" for n, text in enumerate(records)]
    assert not tally.noted
    assert tally.num_records == path.read_bytes().count(b"\n") + (not end or end[-1] != "\n")


@given(
    text=st.text(st.sampled_from("ab \n\u00e9\U0001f600"), min_size=1, max_size=300),
    unit=st.sampled_from([1, 100, 1000]),
    cuts=st.lists(st.integers(0, 10**9), max_size=8),
)
def test_text_cut_anywhere_loses_nothing(
    tmp_path_factory: pytest.TempPathFactory, text: str, unit: int, cuts: list[int]
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.txt"
    path.write_bytes(("x" + "".join(character * unit for character in text)).encode())
    read = [list(read_documents(piece, "text", Tally())) for piece in pieces_at(path, cuts)]
    white = [b"".join(part) for part in read]
    # White space alone is no document, and nothing else is left out.
    assert b"".join(white).decode().split() == path.read_text().split()


def test_a_long_book_is_cut_at_line_ends(tmp_path: Path) -> None:
    book = "".join(f"line {n} of the book\n" for n in range(20_000))
    (tmp_path / "book.txt").write_text(book)
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress(book.encode()))
    for name in ("book.txt", "book.txt.gz"):
        parts = documents(tmp_path / name)
        assert "".join(parts) == book
        assert len(parts) >= 16
        assert all(part.startswith("line ") and part.endswith("\n") for part in parts)


def test_short_files_are_one_document_each(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("second\n")
    (tmp_path / "a.txt").write_text("first\r\nstill first\n")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress("dritter Übergang".encode()))
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbfmarked")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/e.py").write_text("x = 1")
    (tmp_path / "blank").write_text(" \n\t\n")
    (tmp_path / "empty").write_text("")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/x").write_text("no")
    expected = ["first\r\nstill first\n", "second\n", "dritter Übergang", "marked", "x = 1"]
    assert documents(tmp_path) == expected


def test_jsonl_gz(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"record {n}"}) for n in range(100)]
    lines[40] = "{broken"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    tally = Noting()
    assert documents(tmp_path / "a.jsonl.gz", tally=tally) == [f"record {n}" for n in range(100) if n != 40]
    ((record, reason, detail),) = tally.noted
    assert (record, reason) == (41, "not JSON")
    assert "Expecting property name" in detail


# Listing


def test_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "link.txt").symlink_to("a.txt")
    assert documents(tmp_path, tmp_path / "a.txt", tmp_path / "." / "a.txt") == ["one"]


def test_the_output_is_no_input(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/tokenizer.json").write_text("{}")
    assert [file.path for file in listed(tmp_path, exclude=tmp_path / "out")] == [str(tmp_path / "a.txt")]


def test_stdlib() -> None:
    files = listed("stdlib")
    assert len(files) > 300
    assert all(file.path.endswith(".py") for file in files)
    assert not any("site-packages" in file.path or "dist-packages" in file.path for file in files)
    assert files == listed("stdlib")


def test_missing_input(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such input: .*nothing\.txt"):
        listed(tmp_path / "nothing.txt")


def test_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "empty").write_text("")
    with pytest.raises(DataError, match="holds no file with text"):
        listed(tmp_path)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "nothing").touch()
    skipped: list[Skip] = []
    assert [piece.file.path for piece in pieces_of(tmp_path, skipped=skipped)] == [f"{tmp_path}/a.txt"]
    assert skipped == [
        Skip(f"{tmp_path}/gone", None, "unreadable", "No such file or directory"),
        Skip(f"{tmp_path}/nothing", None, "empty", ""),
        Skip(f"{tmp_path}/pipe", None, "unreadable", "not a regular file"),
    ]


# Reading


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (
            "latin.txt",
            "Übergang".encode("latin-1"),
            r"latin\.txt: not UTF-8 \(invalid continuation byte, 0 bytes on\)",
        ),
        ("utf16.txt", "text".encode("utf-16-le"), r"utf16\.txt: binary \(a zero byte in it\)"),
        (
            "broken.txt.gz",
            gzip.compress(os.urandom(5000))[:3000],
            r"broken\.txt\.gz: unreadable \(Compressed file ended",
        ),
        ("no.gz", b"this is not gzip", r"no\.gz: unreadable \(Not a gzipped file"),
        ("flipped.gz", gzip.compress(b"text" * 99)[:-8] + bytes(8), r"flipped\.gz: unreadable \(CRC check failed"),
        ("bad.gz", gzip.compress(b"text" * 99)[:10] + b"\xff" * 40, r"bad\.gz: unreadable \(Error -3"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        documents(tmp_path / name)


def test_file_without_permission(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("no")
    (tmp_path / "secret.txt").chmod(stat.S_IWUSR)
    (piece,) = pieces_of(tmp_path)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything, and nobody may not
    try:
        with pytest.raises(DataError, match=r"secret\.txt: unreadable \(Permission denied\)"):
            list(read_documents(piece, "text", Tally()))
    finally:
        if user == 0:
            os.seteuid(0)


def test_bad_lines_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    lines = [
        '{"text": "good 1"}',
        "not json",
        '{"body": "no text"}',
        '{"text": 5}',
        '["text"]',
        '{"text": "lone \\ud800"}',
        "[" * 100_000,
        '{"text": "\\u00e9 good 2"}',
        "",
        '{"text": "  "}',
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}\n{"text": "good 3"}')
    for cuts in ([], [30], [500, 50_000]):
        tally = Noting()
        read = [d.decode() for piece in pieces_at(path, cuts) for d in read_documents(piece, "text", tally)]
        assert read == ["good 1", "\u00e9 good 2", "good 3"]
        assert [(record, reason) for record, reason, _ in tally.noted] == [
            (2, "not JSON"),
            (3, "no text"),
            (4, "no text"),
            (5, "no text"),
            (6, "not UTF-8"),
            (7, "not JSON"),
            (10, "empty"),
            (11, "not UTF-8"),
        ]
        assert tally.num_records == 12
    assert tally.noted[1][2] == "expected a text in the field 'text', got 'body'"
    assert tally.noted[2][2] == "expected a text in the field 'text', got int"


def test_a_line_longer_than_any_document_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    long = json.dumps({"text": "x" * (2 * LONGEST_RECORD_BYTES)})
    path.write_text("\n".join(['{"text": "one"}', long, '{"text": "two"}']))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
    some_way_in = 3 * LONGEST_RECORD_BYTES // 2
    for pieces in (
        pieces_at(path, []),
        pieces_at(path, [10, 100, some_way_in]),
        pieces_of(path),
        pieces_of(tmp_path / "a.jsonl.gz"),
    ):
        tally = Noting()
        assert [d for piece in pieces for d in read_documents(piece, "text", tally)] == [b"one", b"two"]
        assert tally.noted == [(2, "too long", "more than 16 MiB")]


def test_white_space_is_empty(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "long.txt").write_text("x\n" + "\n" * 200_000 + "y")
    tally = Noting()
    assert documents(tmp_path, tally=tally)[-1].endswith("y")
    assert tally.noted == [(None, "empty", "")], "a cut of white space in a text is no document, and no loss"


def test_another_text_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "yes", "text": "no"}')
    (piece,) = pieces_of(tmp_path)
    assert list(read_documents(piece, "body", Tally())) == [b"yes"]


def write_parquet(path: Path, columns: dict[str, list[object]], rows_per_group: int, **kinds: str) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    table = pa.table({name: pa.array(values, kinds.get(name)) for name, values in columns.items()})
    pq.write_table(table, path, row_group_size=rows_per_group)


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "dictionary"])
def test_parquet_row_groups_are_pieces(tmp_path: Path, kind: str) -> None:
    pa = pytest.importorskip("pyarrow")
    texts = [f"r\u00f6w {n}" for n in range(1000)]
    arrow = pa.dictionary(pa.int32(), pa.string()) if kind == "dictionary" else getattr(pa, kind)()
    values: list[object] = [text.encode() for text in texts] if kind == "binary" else list(texts)
    write_parquet(tmp_path / "a.parquet", {"n": list(range(1000)), "text": values}, 300, text=arrow)
    pieces = pieces_of(tmp_path)
    assert [(piece.start, piece.stop) for piece in pieces] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert all(piece.text_bytes > 0 for piece in pieces)
    assert documents(tmp_path) == texts


def test_bad_rows_of_parquet(tmp_path: Path) -> None:
    rows: list[object] = [b"good 1", None, b"\xff\xfe", b" \n", b"x" * (LONGEST_RECORD_BYTES + 1), b"good 2"]
    write_parquet(tmp_path / "a.parquet", {"text": rows}, 4, text="binary")
    tally = Noting()
    assert documents(tmp_path, tally=tally) == ["good 1", "good 2"]
    assert [(record, reason) for record, reason, _ in tally.noted] == [
        (2, "no text"),
        (3, "not UTF-8"),
        (4, "empty"),
        (5, "too long"),
    ]


def test_parquet_files_without_texts_are_skipped(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"body": ["text"], "text": [7]}, 10)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 is not enough")
    skipped: list[Skip] = []
    assert pieces_of(tmp_path, text_field="content", skipped=skipped) == []
    assert [(Path(skip.file).name, skip.reason) for skip in skipped] == [
        ("a.parquet", "no text"),
        ("b.parquet", "unreadable"),
    ]
    assert skipped[0].detail == "no column 'content'; it has body, text"
    assert len(pieces_of(tmp_path, text_field="body")) == 1
    skipped.clear()
    assert pieces_of(tmp_path, skipped=skipped) == []
    assert skipped[0].detail == "column 'text' holds int64, and no texts"


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"a\.parquet: Parquet files need pyarrow: pip install 'mpipar\[parquet\]'"):
        pieces_of(tmp_path)
