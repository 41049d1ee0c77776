"""The command `python -m benchmarks`."""

from __future__ import annotations

import sys

import tyro

from benchmarks.allreduce import AllReduce
from benchmarks.step import Step
from mpipar.comm import Communicator, decide_on_root, run_job


def main(world: Communicator) -> None:
    question: AllReduce | Step = decide_on_root(
        world,
        lambda: tyro.extras.subcommand_cli_from_dict(
            {"allreduce": AllReduce, "step": Step}, prog="python -m benchmarks", args=sys.argv[1:]
        ),
    )
    question.run(world)


if __name__ == "__main__":
    run_job(main)
