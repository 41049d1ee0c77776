"""The command `python -m mpipar.train`."""

from __future__ import annotations

import sys

from mpipar.comm import Communicator, decide_on_root, run_job
from mpipar.train.config import parse
from mpipar.train.loop import train


def main(world: Communicator) -> None:
    config = decide_on_root(world, lambda: parse(sys.argv[1:]))
    world.progress.timeout_s = config.comm.timeout_s
    train(config, world)


if __name__ == "__main__":
    run_job(main)
