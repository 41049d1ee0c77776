"""Runs mpipar.train with one fault: `failing.py FAULT RANK STEP ARGUMENTS...`.

raise    the rank raises an exception in the forward pass
memory   the rank's GPU has no memory left
nan      the rank's loss is not a number, in STEP alone
nans     the same from STEP on
hang     the rank sleeps
apart    the rank cannot open the memory of others on its host, as in a container of its own; STEP does not matter
slow     the rank takes three seconds for its part of each of its first STEP checkpoints
full     the system takes no files from the rank, as if the disk was full, for its first STEP checkpoints
"""

from __future__ import annotations

import errno
import resource
import sys
import time
from typing import Any

import torch
from torch import Tensor

from mpipar.checkpoint.write import Share
from mpipar.comm import Communicator, run_job, segment
from mpipar.model import Transformer
from mpipar.train.__main__ import main
from mpipar.train.stop import StopRequest

fault, victim, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
del sys.argv[1:4]
loss = Transformer.loss
write = Share.write
calls = 0


def refuse(*_: object) -> None:
    raise OSError(errno.EACCES, "Permission denied")


def faulty_main(world: Communicator) -> None:
    if fault == "apart" and world.rank == victim:
        segment._open = refuse  # type: ignore[assignment]

    def faulty_loss(self: Transformer, *sequences: Any) -> tuple[Tensor, Tensor]:
        global calls
        if not self.training:
            return loss(self, *sequences)
        calls += 1
        value, count = loss(self, *sequences)
        if world.rank == victim and (calls == step or (calls > step and fault == "nans")):
            if fault == "raise":
                raise ZeroDivisionError("the rank's own bug")
            if fault == "memory":
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
            if fault == "hang":
                time.sleep(1000)
            value = value * float("nan")
        return value, count

    def faulty_write(self: Share, *arguments: Any) -> object:
        global calls
        calls += 1
        if fault == "slow":
            time.sleep(3 if calls <= step else 0)
            return write(self, *arguments)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if calls <= step else hard, hard))
        return write(self, *arguments)

    if fault not in ("full", "slow"):
        Transformer.loss = faulty_loss  # type: ignore[assignment, method-assign]
    elif world.rank == victim:
        Share.write = faulty_write  # type: ignore[method-assign, assignment]
    main(world, stop)


stop = StopRequest()
run_job(faulty_main)
