"""The command `python -m mpipar.train`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Literal

from mpipar.train.stop import StopRequest

if TYPE_CHECKING:
    from mpipar.comm import Communicator


def main(world: Communicator, stop: StopRequest) -> Literal["stopped"] | None:
    from mpipar.comm import decide_on_root
    from mpipar.train.config_text import parse
    from mpipar.train.loop import train

    config = decide_on_root(world, lambda: parse(sys.argv[1:]))
    world.progress.timeout_s = config.comm.timeout_s
    return None if train(config, world, stop) else "stopped"


if __name__ == "__main__":
    stop = StopRequest()  # first of all: the imports take seconds
    from mpipar.comm import run_job

    run_job(lambda world: main(world, stop))
