"""Runs mpipar.train with one fault: `failing.py FAULT RANK STEP ARGUMENTS...`.

raise    the rank raises an exception in the forward pass
nan      the rank's loss is not a number, in STEP alone
nans     the same from STEP on
hang     the rank sleeps
apart    the rank cannot open the memory of others on its host, as in a container of its own; STEP does not matter
"""

from __future__ import annotations

import errno
import sys
import time
from typing import Any

from torch import Tensor

from mpipar.comm import Communicator, run_job, segment
from mpipar.model import Transformer
from mpipar.train.__main__ import main
from mpipar.train.stop import StopRequest

fault, victim, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
del sys.argv[1:4]
loss = Transformer.loss
calls = 0


def refuse(*_: object) -> None:
    raise OSError(errno.EACCES, "Permission denied")


def faulty_main(world: Communicator) -> None:
    if fault == "apart" and world.rank == victim:
        segment._open = refuse  # type: ignore[assignment]

    def faulty_loss(self: Transformer, *sequences: Any) -> tuple[Tensor, int]:
        global calls
        if not self.training:
            return loss(self, *sequences)
        calls += 1
        value, count = loss(self, *sequences)
        if world.rank == victim and (calls == step or (calls > step and fault == "nans")):
            if fault == "raise":
                raise ZeroDivisionError("the rank's own bug")
            if fault == "hang":
                time.sleep(1000)
            value = value * float("nan")
        return value, count

    Transformer.loss = faulty_loss  # type: ignore[assignment, method-assign]
    main(world, stop)


stop = StopRequest()
run_job(faulty_main)
