"""What `make gpu-check` makes of its parts. No GPU is needed for it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import Outcome, Part, compare, find_json, parts, run_part, table
from mpipar.errors import ConfigError


def test_without_a_gpu_it_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    with pytest.raises(ConfigError, match="gpu-check needs a GPU"):
        gpu_check.main()


def test_all_is_asked_for() -> None:
    names = [part.name for part in parts()]
    assert len(set(names)) == len(names)
    assert {part.ranks for part in parts() if part.name.startswith("all-reduce")} == {1, 2, 4}
    modules = {part.words[1] for part in parts()} - {"pytest", "benchmarks"}
    assert all((Path(gpu_check.__file__).parents[1] / f"{name.replace('.', '/')}.py").exists() for name in modules)


@pytest.mark.parametrize(
    ("program", "failure", "answer"),
    [
        ("print('# a comment'); print('{\"a\": 1}')", "", {"a": 1}),
        ("raise SystemExit('it broke')", "exit code 1 from: ", {}),
        ("import time; print('{}', flush=True); time.sleep(60)", "not done in 5 s", {}),
    ],
)
def test_a_part(program: str, failure: str, answer: dict[str, int]) -> None:
    began = time.monotonic()
    outcome = run_part(Part("it", 0, ("-c", program), 5.0), ["mpirun"], 100.0)
    assert time.monotonic() - began < 50 and outcome.failure.startswith(failure) and outcome.answer == answer
    assert bool(outcome.failure) == bool(failure) and ("it broke" in program) == ("it broke" in outcome.failure)


@pytest.mark.parametrize(
    ("summary", "failure"),
    [("3 passed, 1 skipped in 0.1s", ""), ("4 skipped in 0.1s", "no test has run"), ("", "no test")],
)
def test_tests_that_were_all_skipped_have_shown_nothing(summary: str, failure: str) -> None:
    outcome = run_part(Part("it", 0, ("-c", f"print('== {summary} ==')", "pytest"), 30.0), ["mpirun"], 30.0)
    assert outcome.failure.startswith(failure) and bool(outcome.failure) == bool(failure)
    assert outcome.answer == {"tests": summary}


def test_a_part_without_time_or_launcher() -> None:
    part = Part("it", 1, ("-c", "pass"), 30.0)
    assert run_part(part, ["mpirun"], 0.0).failure == "not started: the time for all was over"
    assert run_part(part, ["no-such-mpirun"], 30.0).failure.startswith("no-such-mpirun cannot be started: ")


def test_json_among_other_lines() -> None:
    assert find_json('# head\n{broken\n{"rows": [\n{"x": 1}]}\n# foot') == {"rows": [{"x": 1}]}
    assert find_json("nothing") == {}


def test_bits_are_compared() -> None:
    one = Outcome("reproducible, 1 rank", 1.0, answer={"losses": ["0x1p+1", "0x1p+0"], "digest": "a"})
    two = Outcome("reproducible, 2 ranks", 1.0, answer={"losses": ["0x1p+1", "0x1p+0"], "digest": "a"})
    assert compare([one, two]) == ""
    two.answer = {"losses": ["0x1p+1", "0x1.8p+0"], "digest": "b"}
    assert "other bits from step 2 on" in compare([one, two])
    two.answer = {}
    assert compare([one, two]) == "one of the runs has left no result"


def test_the_table() -> None:
    training = {
        "question": "gpu_training",
        "tokens_per_s": {"ours": 98765.4, "bare": 100000.0},
        "mfu": {"ours": 0.512, "bare": None},
        "ours_over_bare": 1.0125,
    }
    shown = table([Outcome("training, 1B", 61.0, answer=training), Outcome("tests", 2.0, "exit code 1 from: x\nlast")])
    assert "ours 98,765 tokens/s, 51.2% of the peak; bare 100,000 tokens/s; time / bare loop 1.012" in shown
    assert "FAILED: exit code 1 from: x" in shown and "last" not in shown
