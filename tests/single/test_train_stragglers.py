"""Slow ranks are named, others are not."""

from __future__ import annotations

from mpipar.train.stragglers import Stragglers


def test_a_slow_rank_is_named_once_a_window() -> None:
    stragglers = Stragglers(every=3)
    said = [stragglers.look([1.0, 1.1, 2.5, 0.9]) for _ in range(6)]
    assert said == ["", "", "rank 2: up to 2.4 times the median time for a microbatch"] * 2


def test_one_slow_step_is_nothing_to_talk_about() -> None:
    stragglers = Stragglers(every=3)
    assert [stragglers.look(step) for step in ([1.0, 1.0, 9.0], [1.0, 1.0, 1.0], [1.0, 1.1, 1.0])] == ["", "", ""]


def test_ranks_without_work_are_not_slow_and_two_are_too_few() -> None:
    stragglers = Stragglers(every=1)
    assert stragglers.look([1.0, 1.0, None, 2.0]) == "rank 3: up to 2.0 times the median time for a microbatch"
    assert stragglers.look([1.0, 5.0]) == ""
    assert stragglers.look([1.0, 5.0, None]) == ""


def test_after_a_death_the_window_begins_anew() -> None:
    stragglers = Stragglers(every=2)
    stragglers.look([1.0, 1.0, 1.0, 9.0])
    assert stragglers.look([1.0, 1.0, 9.0]) == ""
    assert stragglers.look([1.0, 1.0, 9.0]).startswith("rank 2")
