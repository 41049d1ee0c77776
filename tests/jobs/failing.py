"""Runs mpipar.train with one fault: `failing.py FAULT RANK STEP ARGUMENTS...`.

raise    the rank raises an exception in the forward pass
nan      the rank's loss is not a number, in STEP alone
nans     the same from STEP on
hang     the rank sleeps
"""

from __future__ import annotations

import sys
import time
from typing import Any

from torch import Tensor

from mpipar.comm import Communicator, run_job
from mpipar.model import Transformer
from mpipar.train.__main__ import main
from mpipar.train.stop import StopRequest

fault, victim, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
del sys.argv[1:4]
loss = Transformer.loss
calls = 0


def faulty_main(world: Communicator) -> None:
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
