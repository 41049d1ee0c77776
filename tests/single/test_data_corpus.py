"""From inputs to documents: every record exactly once, and what cannot be read named."""

from __future__ import annotations

import gzip
import json
import os
import stat
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpipar.data.corpus import Piece, Skipped, SourceFile, cut, list_files, read_documents
from mpipar.errors import DataError

NOWHERE = Path("/nowhere")


def listed(*inputs: Path | str, skipped: Skipped | None = None, exclude: Path = NOWHERE) -> list[SourceFile]:
    return list_files([str(item) for item in inputs], exclude, skipped or Skipped())


def documents(*inputs: Path | str, skipped: Skipped | None = None) -> list[str]:
    skipped = skipped or Skipped()
    pieces = cut(listed(*inputs, skipped=skipped))
    return [document.decode() for piece in pieces for document in read_documents(piece, "text", skipped)]


def pieces_at(path: Path, cuts: list[int]) -> list[Piece]:
    file = listed(path)[0]
    bounds = sorted({0, file.num_bytes, *(at % file.num_bytes for at in cuts)})
    return [Piece(file, start, stop, 1 << 20) for start, stop in pairwise(bounds)]


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
    skipped = Skipped()
    read = [document.decode() for piece in pieces_at(path, cuts) for document in read_documents(piece, "text", skipped)]
    assert read == [f"{n}:{text}" for n, text in enumerate(records)]
    assert skipped.count == 0


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
    read = [list(read_documents(piece, "text", Skipped())) for piece in pieces_at(path, cuts)]
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
    skipped = Skipped()
    assert documents(tmp_path / "a.jsonl.gz", skipped=skipped) == [f"record {n}" for n in range(100) if n != 40]
    assert skipped.count == 1
    assert "a.jsonl.gz, line 41: Expecting property name" in skipped.named[0]


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
    skipped = Skipped()
    assert documents(tmp_path, skipped=skipped) == ["one"]
    assert skipped.named == [f"{tmp_path}/gone: No such file or directory", f"{tmp_path}/pipe: not a regular file"]


# Reading


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (
            "latin.txt",
            "Übergang".encode("latin-1"),
            r"latin\.txt: not UTF-8 text \(invalid continuation byte, 0 bytes on\)",
        ),
        ("utf16.txt", "text".encode("utf-16-le"), "binary, not text"),
        ("broken.txt.gz", gzip.compress(os.urandom(5000))[:3000], r"broken\.txt\.gz: Compressed file ended"),
        ("no.gz", b"this is not gzip", r"no\.gz: Not a gzipped file"),
        ("flipped.gz", gzip.compress(b"text" * 99)[:-8] + bytes(8), r"flipped\.gz: CRC check failed"),
        ("bad.gz", gzip.compress(b"text" * 99)[:10] + b"\xff" * 40, r"bad\.gz: Error -3"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        documents(tmp_path / name)


def test_file_without_permission(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("no")
    (tmp_path / "secret.txt").chmod(stat.S_IWUSR)
    (piece,) = cut(listed(tmp_path))
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything, and nobody may not
    try:
        with pytest.raises(DataError, match=r"secret\.txt: Permission denied"):
            list(read_documents(piece, "text", Skipped()))
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
        skipped = Skipped()
        read = [d.decode() for piece in pieces_at(path, cuts) for d in read_documents(piece, "text", skipped)]
        assert read == ["good 1", "\u00e9 good 2", "good 3"]
        assert [name.split(",")[1].split(":")[0] for name in skipped.named] == [
            f" line {number}" for number in (2, 3, 4, 5, 6, 7, 11)
        ]
    assert "expected an object with a text in its field 'text'" in skipped.named[1]


def test_only_the_first_are_named_but_all_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("bad\n" * 1000)
    skipped = Skipped()
    assert documents(tmp_path / "a.jsonl", skipped=skipped) == []
    assert (skipped.count, len(skipped.named)) == (1000, 10)


def test_another_text_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "yes", "text": "no"}')
    piece = cut(listed(tmp_path))[0]
    assert list(read_documents(piece, "body", Skipped())) == [b"yes"]
