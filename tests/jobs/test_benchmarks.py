"""The benchmarks run, check what they time, and print what others' tools can read. No figure is judged here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.launches import table
from benchmarks.representations import representations
from mpipar.comm.environment import mpi_facts
from tests.jobs.launch import Job, Outcome, mpirun, run

TWO_SIZES = ["--min-bytes", "1024", "--max-bytes", "16384", "--factor", "16", "--rounds", "2", "--warmup", "1"]

# The contestants on one host, which numbers there are, what is reduced, busbw / algbw on two ranks.
COLLECTIVES = {
    "allreduce": (7, 1, "sum", 1.0),
    "reduce_scatter": (4, 2, "sum", 0.5),
    "all_gather": (4, 2, "none", 0.5),
    "all_to_all": (3, 2, "none", 0.5),
    "p2p": (3, 1, "none", 1.0),
}


def ask(question: str, *options: str, ranks: int = 2) -> Outcome:
    return run(ranks, "-m", "benchmarks", question, *options)


@pytest.mark.parametrize("question", COLLECTIVES)
def test_tables_of_nccl_tests(question: str) -> None:
    contestants, ranks_in_count, redop, factor = COLLECTIVES[question]
    outcome = ask(question, *TWO_SIZES).ok()
    rows = [line.split() for line in outcome.lines if line.startswith("  ") and " float " in line]
    assert len(rows) == 2 * (contestants + 1), "two sizes of each contestant and of the limit"
    for size, count, _, op, root, time_us, algbw, busbw, wrong, limit, call in rows:
        assert int(size) == 4 * int(count) * ranks_in_count and (op, root) == (redop, "-1")
        assert float(time_us) > 0 and abs(float(algbw) * factor - float(busbw)) < 0.02
        assert wrong == ("N/A" if call == "copyto" else "0") and float(limit) >= 0
    assert outcome.text.count("# Avg bus bandwidth") == contestants + 1
    assert outcome.text.count("# Out of bounds values : 0 OK") == contestants


def test_bfloat16_is_compared_with_gloo_alone() -> None:
    outcome = ask("allreduce", *TWO_SIZES, "--dtype", "bfloat16").ok()
    assert "# no mpi: MPI adds up no bfloat16" in outcome.lines
    assert outcome.text.count("# Out of bounds values : 0 OK") == 5


@pytest.mark.parametrize(
    ("question", "head"),
    [
        (["allreduce", "--algorithms", "ring,mpi"], "# Size       Avg Latency(us)"),
        (["p2p", "--pattern", "stream", "--algorithms", "mpipar,mpi"], "# Size      Bandwidth (MB/s)"),
    ],
)
def test_tables_of_the_osu_benchmarks(question: list[str], head: str) -> None:
    outcome = ask(*question, *TWO_SIZES, "--format", "osu").ok()
    begins = [i for i, line in enumerate(outcome.lines) if line == head]
    assert len(begins) == 3, "two contestants and the limit"
    for i in begins:
        assert outcome.lines[i - 1].startswith("# OSU MPI ")
        rows = [line.split() for line in outcome.lines[i + 1 : i + 3]]
        assert [size for size, _ in rows] == ["1024", "16384"] and all(float(value) > 0 for _, value in rows)


def test_launches_alternate_and_are_compared() -> None:
    launch = f"{mpirun()} -n 2 {sys.executable}"
    launches = [launch, f"MPIPAR_ALLREDUCE=ring {launch}"]
    question = ["--", "allreduce", *TWO_SIZES, "--algorithms", "private,mpi"]
    options = ["--repeat", "1", "--format", "json", *(word for text in launches for word in ("--launch", text))]
    outcome = run(0, "-m", "benchmarks.launches", *options, *question).ok()
    assert [line for line in outcome.lines if line.startswith("launch ")] == ["launch 1 of 1: A", "launch 1 of 1: B"]
    documents: list[dict[str, Any]] = json.JSONDecoder().raw_decode(outcome.text[outcome.text.index("[\n") :])[0]
    assert [document["launch"] for document in documents] == launches
    for document in documents:
        (answer,) = document["answers"]
        assert answer["question"] == "allreduce" and answer["environment"]["ranks"] == 2
        rows = [(row["size"], row["contestant"], row["wrong"]) for row in answer["rows"]]
        names = (("private", 0), ("mpi", 0), ("limit", None))
        assert rows == [(size, *name) for size in (1024, 16384) for name in names]
    lines = table(launches, [document["answers"] for document in documents]).splitlines()
    assert [line.split()[:2] for line in lines[3:9]] == [[str(size), name] for size, name, _ in rows]


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "speeds.png"
    ask("allreduce", *TWO_SIZES, "--algorithms", "private,mpi", "--plot", str(picture)).ok()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_overlap_prints_tables_of_the_osu_benchmarks() -> None:
    outcome = ask("overlap", *["--min-bytes", "65536", "--max-bytes", "65536", "--rounds", "2", "--warmup", "1"]).ok()
    rows = [line.split() for line in outcome.lines if line.startswith("65536 ")]
    assert len(rows) == 5
    for _, overall, compute, alone, _, wrong in rows:
        assert min(float(overall), float(compute), float(alone)) > 0 and wrong == "0"


def test_step_compares_four_ways() -> None:
    small = "--layers 1 --dim 32 --heads 2 --vocab-size 64 --batch 1 --seq-len 16 --rounds 2 --warmup 1"
    outcome = ask("step", *small.split()).ok()
    for name in ("no communication", "mpipar, shared memory", "mpipar, ordinary memory", "torch DDP, gloo"):
        assert sum(line.startswith(f"  {name}") for line in outcome.lines) == 1


def test_exact_compares_what_can_hold_a_sum(data: Path) -> None:
    small = ["--microbatches", "4", "--steps", "1", "--rounds", "1", "--warmup", "0"]
    outcome = ask("exact", "--data", str(data), *small).ok()
    for title in (how.title for how in representations().values()):
        rows = [line.removeprefix(f"  {title}").split() for line in outcome.lines if line.startswith(f"  {title}")]
        errors, costs = rows[0], rows[1:]
        differing = int(errors[7])
        assert (differing > 0) == title.startswith("float32")
        assert len(costs) == 1 or not title.startswith("float32")
        assert ("float64" in title or "int64" in title) == (float(errors[0]) < 1e-12)


@pytest.mark.skipif(mpi_facts().fault_tolerance == "absent", reason="this MPI has no fault tolerance")
def test_recovery_kills_a_rank_and_sees_the_other_go_on(data: Path) -> None:
    few = ["--ranks", "2", "--least", "1", "--jobs", "1", "--by-hand", "0", "--torchrun", "0"]
    outcome = run(0, "-m", "benchmarks.recovery", "--data", str(data), *few).ok()
    (row,) = [line.split() for line in outcome.lines if line.startswith("  mpipar, 2 ranks ")]
    least, low, median, high, most, count, failed, step_s = map(float, row[3:])
    assert 0 < least == low == median == high == most and (count, failed) == (1, 0) and step_s > 0
    assert sum(line.startswith("# of mpipar's, from noticing") for line in outcome.lines) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["exact", "--data", "nix"], "there is no data set at nix"),
        (["exact", "--microbatches", "1"], "--microbatches 1 must be at least 2"),
        (["allreduce", "--max-bytes", "5"], "--min-bytes 4096 must be at least 1 and at most --max-bytes 5"),
        (["all_gather", "--algorithms", "arena,nix"], "there is no 'nix' here, only arena, private, mpi, gloo"),
        (["allreduce", "--algorithms", "hierarchical"], "no hierarchical: there is one host"),
        (["step", "--rounds", "0"], "--rounds 0 must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(options: list[str], message: str) -> None:
    ask(*options).refused(message)


def test_one_rank_is_refused() -> None:
    ask("p2p", ranks=1).refused("one rank has nobody to communicate with")


def test_launches_that_cannot_be_are_refused() -> None:
    run(0, "-m", "benchmarks.launches", "--launch", "nix", "--launch", "python", "--", "p2p").refused("no program nix")


def test_deaths_that_cannot_be_are_refused() -> None:
    run(0, "-m", "benchmarks.recovery", "--ranks", "2", "--least", "2").refused("--least 2 must be at least 1")
    run(0, "-m", "benchmarks.recovery", "--data", "nix").refused("--data nix does not exist")
    run(0, "-m", "benchmarks.dying", "--data", "nix").refused("--data nix does not exist")
    run(0, "-m", "benchmarks.dying", "--data", ".", "--steps", "9").refused("--steps 9 must be at least 10")
    run(0, "-m", "benchmarks.balance", "--data", "nix").refused("--data nix does not exist")
    run(0, "-m", "benchmarks.balance", "--data", ".", "--slowdown", "1").refused("--slowdown 1 must be more than 1")


@pytest.mark.timeout(300)
@pytest.mark.skipif(mpi_facts().fault_tolerance == "absent", reason="this MPI has no fault tolerance")
def test_the_picture_of_dying_ranks(data: Path, tmp_path: Path) -> None:
    picture = tmp_path / "dying.png"
    outcome = (
        Job(0, "-m", "benchmarks.dying", *["--data", str(data), "--steps", "10"], "--out", str(picture))
        .finish(280)
        .ok()
    )
    assert sum(line.startswith("  lost ") for line in outcome.lines) == 8
    assert sum(line.endswith(": the loss of 1 rank at all 10 steps") for line in outcome.lines) == 3
    assert picture.stat().st_size > 10_000


def test_random_reads_beside_numpy() -> None:
    outcome = ask("data", "--shards", "16", "--tokens", "9000", "--reads", "20", "--rounds", "2", "--warmup", "1").ok()
    rows = [line.split()[0] for line in outcome.lines if line.startswith("  ")]
    assert set(rows) == {"stored", "batch", "first", "all", "start", "no", "memory"}
    assert outcome.text.count("numpy memmap  ") >= 3


def test_packing_beside_the_tokenizer_alone(tmp_path: Path) -> None:
    small = ["--megabytes", "1", "--vocab-size", "300", "--rounds", "1", "--folder", str(tmp_path)]
    outcome = ask("pack", *small).ok()
    rates = {line[:36].strip(): float(line[36:]) for line in outcome.lines if line.startswith("  ")}
    assert len(rates) == 8 and min(rates.values()) > 0
    assert "packing is" in outcome.text and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_checkpoints_beside_plain_files(ranks: int, tmp_path: Path) -> None:
    small = ["--layers", "1", "--dim", "64", "--vocab-size", "300", "--rounds", "2", "--folder", str(tmp_path)]
    outcome = ask("checkpoint", *small, ranks=ranks).ok()
    contestants = [line.split()[0] for line in outcome.lines if line.startswith("  ") and " % (" in line]
    assert contestants[: 4 - ranks] == ["plain", "mpipar", "torch"][: 4 - ranks]
    assert "all of it, less a copy by numpy" in outcome.text
    assert list(tmp_path.iterdir()) == []
