"""The packer: the same bits at every rank count, every document once, no duplicate in validation, and bad input."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mpipar.comm import Communicator
from mpipar.data import ShardSet, tokenizer
from mpipar.data.pack import pack
from mpipar.data.recipe import PackSettings
from mpipar.data.report import describe, verify
from mpipar.data.skipped import Skip, read_list
from mpipar.errors import MpiparError, PeerError

SMALL = PackSettings(vocab_size=300, val_fraction=0.1)


def on_root(comm: Communicator, action: Callable[[], object]) -> None:
    if comm.rank == 0:
        action()
    comm.barrier()


def story(number: int, num_words: int = 200) -> str:
    words = np.random.default_rng(number).integers(0, 3000, num_words)
    return f"story {number}: " + " ".join(f"w{word}" for word in words)


def write_stories(folder: Path, numbers: range) -> None:
    folder.mkdir(exist_ok=True)
    half = len(numbers) // 2
    for number in numbers[:half]:
        (folder / f"{number}.txt").write_text(story(number))
    lines = [json.dumps({"text": story(number)}) for number in numbers[half:]]
    (folder / "more.jsonl").write_text("\n".join(lines))


def documents(folder: Path, split: str) -> list[str]:
    with ShardSet.open(folder, split) as shards:
        made_by = shards.read_tokenizer()
        found = []
        for shard in shards.shards:
            bounds = shard.read_documents()
            tokens = shard.tokens.array()
            assert (tokens[bounds[1:] - 1] == made_by.end_of_text).all()
            found += [made_by.decode(part[:-1].tolist()) for part in np.split(tokens, bounds[1:-1])]
        return found


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def refused(comm: Communicator, message: str, action: Callable[[], object]) -> None:
    """All ranks leave by an error, and exactly one has something to say."""
    with pytest.raises(MpiparError) as caught:
        action()
    said = comm.all_gather_object(None if isinstance(caught.value, PeerError) else str(caught.value))
    said = [text for text in said if text is not None]
    assert len(said) == 1
    assert re.search(message, said[0], re.DOTALL), said[0]


def test_the_same_bits_at_every_rank_count(comm: Communicator, shared_path: Path) -> None:
    on_root(comm, lambda: write_stories(shared_path / "in", range(600)))
    pack(comm, [str(shared_path / "in")], shared_path / "together", SMALL)
    alone = comm.split("alone", comm.rank, 0)
    pack(alone, [str(shared_path / "in")], shared_path / f"alone{comm.rank}", SMALL)
    alone.free()
    assert content(shared_path / f"alone{comm.rank}") == content(shared_path / "together")
    assert len(content(shared_path / "together")) >= 8


def test_every_document_once_in_one_split(comm: Communicator, shared_path: Path) -> None:
    on_root(comm, lambda: write_stories(shared_path / "in", range(400)))
    pack(comm, [str(shared_path / "in")], shared_path / "out", SMALL)
    train, val = documents(shared_path / "out", "train"), documents(shared_path / "out", "val")
    assert sorted(train + val) == sorted(story(number) for number in range(400))
    assert 30 <= len(val) <= 50


def test_the_split_depends_on_content_only(comm: Communicator, shared_path: Path) -> None:
    """Other files beside it, or another order, move a document only at the edge of the fraction."""
    on_root(comm, lambda: write_stories(shared_path / "a", range(300)))
    on_root(comm, lambda: write_stories(shared_path / "b", range(320)))
    for name in ("a", "b"):
        pack(comm, [str(shared_path / name)], shared_path / f"out_{name}", SMALL)
    a, b = (set(documents(shared_path / f"out_{name}", "val")) for name in ("a", "b"))
    assert len(a - b) <= 3


def test_no_near_duplicate_in_validation(comm: Communicator, shared_path: Path) -> None:
    def write() -> None:
        write_stories(shared_path / "in", range(200))
        for number in range(200, 400):
            (shared_path / f"in/{number}a.txt").write_text(story(number))
            (shared_path / f"in/{number}b.txt").write_text(story(number).replace(" ", "\n", 20) + " and an end")

    on_root(comm, write)
    pack(comm, [str(shared_path / "in")], shared_path / "out", PackSettings(vocab_size=300, val_fraction=0.2))
    val = documents(shared_path / "out", "val")
    numbers = {int(re.findall(r"story\s(\d+)", text)[0]) for text in val}
    assert len(val) > 40
    assert all(number < 200 for number in numbers)


def test_unreadable_files_are_named_and_the_rest_is_packed(
    comm: Communicator, shared_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def write() -> None:
        write_stories(shared_path / "in", range(100))
        for number in range(14):
            (shared_path / f"in/latin{number:02}.txt").write_bytes(b"\xe9t\xe9")
        (shared_path / "in/lines.jsonl").write_text('{"text": "the good line"}\nbad line\n')
        (shared_path / "in/torn.gz").write_bytes(b"\x1f\x8b")

    on_root(comm, write)
    pack(comm, [str(shared_path / "in")], shared_path / "out", SMALL)
    found = documents(shared_path / "out", "train") + documents(shared_path / "out", "val")
    assert sorted(found) == sorted([story(number) for number in range(100)] + ["the good line"])
    record = json.loads((shared_path / "out/pack.json").read_text())
    assert (record["num_skipped"], record["skipped"]) == (16, {"not JSON": 1, "not UTF-8": 14, "unreadable": 1})
    listed = list(read_list(shared_path / "out/skipped.jsonl"))
    assert listed[:14] == [
        Skip(f"{shared_path}/in/latin{n:02}.txt", None, "not UTF-8", "invalid continuation byte, 0 bytes on")
        for n in range(14)
    ]
    assert (Path(listed[14].file).name, listed[14].record, listed[14].reason) == ("lines.jsonl", 2, "not JSON")
    assert (Path(listed[15].file).name, listed[15].record, listed[15].reason) == ("torn.gz", None, "unreadable")
    printed = capsys.readouterr().out
    if comm.rank == 0:
        assert "skipped 16 files or records: not JSON 1, not UTF-8 14, unreadable 1" in printed
        assert f"All of them are in {shared_path}/out/skipped.jsonl" in printed
        assert "latin09.txt: not UTF-8 (invalid continuation byte, 0 bytes on)" in printed
        assert "latin10.txt" not in printed
    else:
        assert printed == ""


def test_bad_records_have_their_numbers_however_a_file_is_cut(comm: Communicator, shared_path: Path) -> None:
    bad = range(5, 10_000, 311)

    def write() -> None:
        lines = [json.dumps({"text": f"a line of text, number {n}, with something in it"}) for n in range(10_000)]
        for n in bad:
            lines[n] = '{"text": ""}' if n % 2 else "{"
        (shared_path / "in.jsonl").write_text("\n".join(lines))

    on_root(comm, write)
    pack(comm, [str(shared_path / "in.jsonl")], shared_path / "out", SMALL)
    listed = list(read_list(shared_path / "out/skipped.jsonl"))
    assert [(skip.record, skip.reason) for skip in listed] == [(n + 1, "empty" if n % 2 else "not JSON") for n in bad]
    alone = comm.split("alone", comm.rank, 0)
    pack(alone, [str(shared_path / "in.jsonl")], shared_path / f"alone{comm.rank}", SMALL)
    alone.free()
    assert content(shared_path / f"alone{comm.rank}") == content(shared_path / "out")


def test_a_parquet_file_is_shared(comm: Communicator, shared_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def write() -> None:
        texts = [None if number == 70 else story(number) for number in range(100)]
        pq.write_table(pa.table({"body": texts}), shared_path / "in.parquet", row_group_size=20)

    on_root(comm, write)
    settings = PackSettings(vocab_size=300, val_fraction=0.1, text_field="body")
    pack(comm, [str(shared_path / "in.parquet")], shared_path / "out", settings)
    found = documents(shared_path / "out", "train") + documents(shared_path / "out", "val")
    assert sorted(found) == sorted(story(number) for number in range(100) if number != 70)
    assert list(read_list(shared_path / "out/skipped.jsonl")) == [
        Skip(f"{shared_path}/in.parquet", 71, "no text", "null")
    ]


def test_packing_again(comm: Communicator, shared_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    on_root(comm, lambda: write_stories(shared_path / "in", range(60)))

    def again(settings: PackSettings = SMALL, overwrite: bool = False) -> None:
        pack(comm, [str(shared_path / "in")], shared_path / "out", settings, overwrite)

    again()
    before = content(shared_path / "out")
    capsys.readouterr()
    again()
    assert comm.rank > 0 or "already packed" in capsys.readouterr().out
    larger = PackSettings(vocab_size=310, val_fraction=0.1)
    refused(comm, "holds a data set that was packed from other input.*--overwrite", lambda: again(larger))
    on_root(comm, lambda: write_stories(shared_path / "in", range(61)))
    refused(comm, "holds a data set that was packed from other input.*--overwrite", again)
    comm.barrier()
    assert content(shared_path / "out") == before
    again(larger, overwrite=True)
    with ShardSet.open(shared_path / "out", "train") as shards:
        assert shards.vocab_size == 310


def test_a_folder_of_other_files_is_not_touched(comm: Communicator, shared_path: Path) -> None:
    on_root(comm, lambda: write_stories(shared_path / "in", range(60)))
    on_root(comm, lambda: (shared_path / "in/keep").write_text("precious"))

    def overwrite() -> None:
        pack(comm, [str(shared_path / "in")], shared_path / "in", SMALL, overwrite=True)

    refused(comm, "holds other files, and no data set that was made here", overwrite)
    assert (shared_path / "in/keep").read_text() == "precious"


def test_bad_inputs(comm: Communicator, shared_path: Path) -> None:
    def write() -> None:
        write_stories(shared_path / "in", range(20))
        (shared_path / "empty").mkdir()
        (shared_path / "binary").mkdir()
        (shared_path / "binary/a").write_bytes(bytes(100))
        (shared_path / "same").mkdir()
        for number in range(5):
            (shared_path / f"same/{number}").write_text("the same text in every file of this folder")
        (shared_path / "one.txt").write_text("a single short document")
        (shared_path / "tokenizer.json").write_text('{"no": "tokenizer"}')

    on_root(comm, write)
    out = shared_path / "out"

    def try_pack(*names: str, **settings: object) -> Callable[[], None]:
        return lambda: pack(comm, [str(shared_path / name) for name in names], out, PackSettings(**settings))  # type: ignore[arg-type]

    refused(comm, "nothing to pack", try_pack())
    refused(comm, "no such input: .*missing", try_pack("in", "missing"))
    refused(comm, "empty: the folder holds no file", try_pack("empty"))
    refused(comm, "holds no text that can be read.*binary/a: binary \\(a zero byte", try_pack("binary"))
    refused(comm, "no document can be kept for validation: all 5 candidates resemble", try_pack("same"))
    refused(comm, r"1 document \(23 bytes\) cannot be split", try_pack("one.txt"))
    refused(comm, r"tokenizer\.json is not a tokenizer", try_pack("in", tokenizer=str(shared_path / "tokenizer.json")))
    refused(
        comm, "cannot read the tokenizer .*: No such file", try_pack("in", tokenizer=str(shared_path / "none.json"))
    )
    assert not out.exists()
    assert not list(shared_path.glob(".partial-*"))


def test_without_validation(comm: Communicator, shared_path: Path) -> None:
    on_root(comm, lambda: (shared_path / "one.txt").write_text("a single short document"))
    pack(comm, [str(shared_path / "one.txt")], shared_path / "out", PackSettings(vocab_size=300, val_fraction=0))
    assert documents(shared_path / "out", "train") == ["a single short document"]
    assert "val " not in describe(shared_path / "out")


def test_a_single_book_is_split(comm: Communicator, shared_path: Path) -> None:
    on_root(comm, lambda: (shared_path / "book.txt").write_text("\n".join(story(number) for number in range(1000))))
    pack(comm, [str(shared_path / "book.txt")], shared_path / "out", SMALL)
    with ShardSet.open(shared_path / "out", "train") as train, ShardSet.open(shared_path / "out", "val") as val:
        assert 0.05 < val.text_bytes / (train.text_bytes + val.text_bytes) < 0.2


def test_a_given_tokenizer(comm: Communicator, shared_path: Path) -> None:
    given = tokenizer.train([story(number) for number in range(50)], 290)
    on_root(comm, lambda: write_stories(shared_path / "in", range(60)))
    on_root(comm, lambda: (shared_path / "mine.json").write_text(given.text))
    pack(
        comm,
        [str(shared_path / "in")],
        shared_path / "out",
        PackSettings(tokenizer=str(shared_path / "mine.json"), val_fraction=0.1),
    )
    with ShardSet.open(shared_path / "out", "train") as shards:
        assert (shards.vocab_size, shards.tokenizer_id) == (290, given.identity)


def test_full_disk_on_one_rank(comm: Communicator, shared_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_root(comm, lambda: write_stories(shared_path / "in", range(600)))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def pack_it(name: str) -> None:
        pack(comm, [str(shared_path / "in")], shared_path / name, SMALL)

    with monkeypatch.context() as patched:
        if comm.rank == comm.size - 1:
            patched.setattr("os.posix_fallocate", full)
        # Alone, it is the first thing to be written that fails; otherwise a shard, and the others' are finished.
        message = (
            r"survey\.h5: No space left" if comm.size == 1 else r"\.h5 .*No space left.* kept in .*\.partial-.*-out"
        )
        refused(comm, f"cannot write .*{message}", lambda: pack_it("out"))
    comm.barrier()
    assert not (shared_path / "out").exists()
    before = {path.name: path.stat().st_ino for path in shared_path.glob(".partial-*-out/*.h5")}
    assert len(list(shared_path.glob(".partial-*"))) == (comm.size > 1)
    comm.barrier()
    pack_it("out")
    pack_it("undisturbed")
    comm.barrier()
    assert content(shared_path / "out") == content(shared_path / "undisturbed")
    after = {path.name: path.stat().st_ino for path in (shared_path / "out").iterdir() if path.name in before}
    assert after == before, "what was finished is not written again"
    assert sorted(path.name for path in shared_path.iterdir()) == ["in", "out", "undisturbed"]


def test_leftovers_of_another_recipe_are_removed(comm: Communicator, shared_path: Path) -> None:
    def write() -> None:
        write_stories(shared_path / "in", range(60))
        (shared_path / ".partial-00000000-out").mkdir()
        (shared_path / ".partial-00000000-out/train-00000.h5").write_text("of another recipe")
        (shared_path / ".partial-00000000-out-of-it").mkdir()

    on_root(comm, write)
    pack(comm, [str(shared_path / "in")], shared_path / "out", SMALL)
    comm.barrier()  # after which rank 0 has let go of the lock
    assert sorted(path.name for path in shared_path.iterdir()) == [".partial-00000000-out-of-it", "in", "out"]


def test_input_that_changes_meanwhile(comm: Communicator, shared_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_root(comm, lambda: write_stories(shared_path / "in", range(60)))
    train = tokenizer.train

    def slow_train(documents: list[str], vocab_size: int) -> tokenizer.Tokenizer:
        (shared_path / "in/3.txt").write_text("another text")
        return train(documents, vocab_size)

    monkeypatch.setattr(tokenizer, "train", slow_train)
    with pytest.raises(MpiparError):
        pack(comm, [str(shared_path / "in")], shared_path / "out", SMALL)
    comm.barrier()
    assert not (shared_path / "out").exists()


def test_verify_names_all_that_is_damaged(comm: Communicator, shared_path: Path) -> None:
    out = shared_path / "out"
    on_root(comm, lambda: write_stories(shared_path / "in", range(600)))
    pack(comm, [str(shared_path / "in")], out, SMALL)
    assert verify(comm, out) == []

    def damage() -> None:
        flipped = bytearray((out / "train-00002.h5").read_bytes())
        with ShardSet.open(out, "train") as shards:
            flipped[flipped.index(shards.shards[2].tokens.array().tobytes()[:64]) + 1000] ^= 1
        (out / "train-00002.h5").write_bytes(flipped)
        (out / "train-00005.h5").write_bytes((out / "train-00005.h5").read_bytes()[:5000])

    on_root(comm, damage)
    problems = verify(comm, out)
    assert len(problems) == 2
    assert "train-00002.h5: array 'tokens' is damaged in block 0" in problems[0]
    assert "train-00005.h5 is 5,000 bytes long" in problems[1]
    on_root(comm, lambda: shutil.rmtree(out))
    refused(comm, "there is no data set at", lambda: verify(comm, out))


def test_verify_notices_what_is_missing(comm: Communicator, shared_path: Path) -> None:
    on_root(comm, lambda: write_stories(shared_path / "in", range(600)))
    pack(comm, [str(shared_path / "in")], shared_path / "out", SMALL)
    on_root(comm, lambda: (shared_path / "out/train-00003.h5").unlink())
    (problem,) = verify(comm, shared_path / "out")
    assert re.search(r"train-00003\.h5 of \d+ train shards is missing", problem)


def test_verify_finds_a_flipped_bit_in_any_file(comm: Communicator, shared_path: Path) -> None:
    """Of tokens and of what is beside them: headers, gaps, tables of checksums, the indices, the tokenizer."""
    out = shared_path / "out"
    on_root(comm, lambda: write_stories(shared_path / "in", range(40)))
    pack(comm, [str(shared_path / "in")], out, SMALL)
    rng = random.Random(1)
    paths = sorted([*out.glob("*.h5"), out / "tokenizer.json"])
    assert {"train-00000.h5", "val-00000.h5", "train.index.h5", "val.index.h5"} < {path.name for path in paths}
    for path in paths:
        content = path.read_bytes()
        size = len(content)
        ends = (0, 700), (max(0, size - 300), size), (content.find(b"\0" * 64), size), (0, size)
        for place in [rng.randrange(max(0, begin), min(end, size)) for begin, end in ends for _ in range(3)]:
            flipped = bytearray(content)
            flipped[place] ^= 1 << rng.randrange(8)
            comm.barrier()
            on_root(comm, partial(path.write_bytes, flipped))
            problems = verify(comm, out)
            assert problems and all(path.name in problem for problem in problems), (path.name, place, problems)
        comm.barrier()
        on_root(comm, partial(path.write_bytes, content))
    assert verify(comm, out) == []
