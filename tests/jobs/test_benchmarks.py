"""The benchmarks run, check what they time, and print tables that others' tools can read. No figure is judged here."""

from __future__ import annotations

from tests.jobs.launch import run


def test_allreduce_prints_tables_of_nccl_tests() -> None:
    small = "--max-bytes 16384 --rounds 2 --warmup 1"
    outcome = run(2, "-m", "benchmarks", "allreduce", *small.split()).ok()
    rows = [line.split() for line in outcome.lines if line.startswith("  ") and "float32" in line]
    assert len(rows) == 2 * 4, "two sizes of each of four contestants"
    for size, count, dtype, op, root, time_us, algbw, busbw, wrong in rows:
        assert int(size) == 4 * int(count) and (dtype, op, root, wrong) == ("float32", "sum", "-1", "0")
        assert float(time_us) > 0 and abs(float(algbw) - float(busbw)) < 0.02, "on two ranks they are the same"
    assert outcome.text.count("# Avg bus bandwidth") == 4


def test_step_compares_four_ways() -> None:
    small = "--layers 1 --dim 32 --heads 2 --vocab-size 64 --batch 1 --seq-len 16 --rounds 2 --warmup 1"
    outcome = run(2, "-m", "benchmarks", "step", *small.split()).ok()
    for name in ("no communication", "mpipar, shared memory", "mpipar, ring", "torch DDP, gloo"):
        assert sum(line.startswith(f"  {name}") for line in outcome.lines) == 1
