"""What a roll call comes to, in words."""

from __future__ import annotations

import pytest

from mpipar.comm.mpi import MPI
from mpipar.comm.roll_call import RollCall, _report, names


def test_ranks_are_named_up_to_sixteen() -> None:
    assert names([3]) == "rank 3" and names([0, 2]) == "ranks 0, 2"
    assert names(range(1000)) == f"ranks {', '.join(map(str, range(16)))} and 984 more"


@pytest.mark.parametrize(
    ("heard", "dead", "report"),
    [
        ({1: "sum #3", 2: "sum #3"}, [], "All ranks are in it: messages are lost, or the network is down. "),
        ({1: "sum #3"}, [], "Rank 2 did not arrive, and gave no sign for 2 s: busy, stuck or gone. "),
        ({}, [], "Ranks 1, 2 did not arrive, and gave no sign for 2 s: busy, stuck or gone. "),
        ({1: "", 2: "barrier #1"}, [], "Rank 1 is in no operation. Rank 2 is in barrier #1. "),
        ({2: "sum #3"}, [1], "Rank 1 died. "),
    ],
)
def test_who_is_missing(heard: dict[int, str], dead: list[int], report: str) -> None:
    here = [0, *(rank for rank, status in heard.items() if status == "sum #3")]
    assert _report("sum #3", 0, [1, 2], heard, dead) == f"{report}{names(here).capitalize()} waited"


def test_a_rank_alone_needs_no_answer() -> None:
    said = RollCall(MPI.COMM_SELF).take("sum #3", None, lambda: pytest.fail("nobody is to be waited for"))
    assert said.startswith("All ranks are in it") and said.endswith("Rank 0 waited")
