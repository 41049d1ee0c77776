"""The command `python -m benchmarks`."""

from __future__ import annotations

import sys

import tyro

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

Question = (
    AllReduce | ReduceScatter | AllGather | AllToAll | PointToPoint | Overlap | Step | Exact | Data | Pack | Checkpoint
)


def main(world: Communicator) -> None:
    question = decide_on_root(world, _question)
    question.run(world)


def _question() -> Question:
    question: Question = tyro.extras.subcommand_cli_from_dict(
        {
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
        },
        prog="python -m benchmarks",
        args=sys.argv[1:],
    )
    return question


if __name__ == "__main__":
    run_job(main)
