"""The command `python -m benchmarks`."""

from __future__ import annotations

from benchmarks.all_to_all import AllToAll
from benchmarks.allreduce import AllReduce
from benchmarks.checkpoint import Checkpoint
from benchmarks.data import Data
from benchmarks.exact import Exact
from benchmarks.halves import AllGather, ReduceScatter
from benchmarks.overlap import Overlap
from benchmarks.p2p import PointToPoint
from benchmarks.pack import Pack
from benchmarks.step import Step
from mpipar.comm import Communicator, decide_on_root, run_job
from mpipar.command_line import parse_one_of

Question = (
    AllReduce | ReduceScatter | AllGather | AllToAll | PointToPoint | Overlap | Step | Exact | Data | Pack | Checkpoint
)

_QUESTIONS: dict[str, type[Question]] = {
    "allreduce": AllReduce,
    "reduce_scatter": ReduceScatter,
    "all_gather": AllGather,
    "all_to_all": AllToAll,
    "p2p": PointToPoint,
    "overlap": Overlap,
    "step": Step,
    "exact": Exact,
    "data": Data,
    "pack": Pack,
    "checkpoint": Checkpoint,
}


def main(world: Communicator) -> None:
    question = decide_on_root(world, lambda: parse_one_of(_QUESTIONS, "python -m benchmarks"))
    question.run(world)


if __name__ == "__main__":
    run_job(main)
