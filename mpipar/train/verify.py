"""Silent corruption: replicas that should be equal, and are not.

A bit that flips in one rank's memory, or a processor that now and then multiplies wrongly, makes no error; it makes a
replica that trains another model, and poisons the gradients of all. Every few steps, and before every checkpoint, the
ranks compare the digests of their weights and optimizer state.

    most agree      the others are named, and take the state of one that agrees
    no majority     nobody knows who is right: the run ends, and goes on from the last checkpoint, which was verified;
                    every rank computes one microbatch twice from one state, to find out whose processor errs

Dixit et al., "Silent Data Corruptions at Scale", 2021, tells how often it happens.
"""

from __future__ import annotations

from collections import Counter

from mpipar import checkpoint
from mpipar.comm import Communicator, names
from mpipar.errors import CorruptionError
from mpipar.train.source import Source
from mpipar.train.step import TrainStep


def verify(comm: Communicator, step: TrainStep, source: Source) -> str:
    """Collective: compares the replicas, and repairs what can be.

    Returns:
        What was found and repaired; nothing if all is well.

    Raises:
        CorruptionError: On all ranks: nobody can tell whose state is right.
    """
    digests = comm.all_gather_object(step.digest())
    ((most, votes),) = Counter(digests).most_common(1)
    if votes == comm.size:
        return ""
    odd = [rank for rank, digest in enumerate(digests) if digest != most]
    root = digests.index(most) if 2 * votes > comm.size else 0
    comm.broadcast_state(checkpoint.capture(step.model, step.optimizer), root)
    if 2 * votes > comm.size:
        return f"{names(odd)} had other weights than the rest: repaired from rank {root}. Have the memory looked at"
    suspects = _suspects(comm, step, source)
    raise CorruptionError(
        f"the weights of the ranks differ, and there is no majority that is right. {suspects}. The same command goes "
        "on from the last checkpoint, which was verified"
    )


def _suspects(comm: Communicator, step: TrainStep, source: Source) -> str:
    """Collective: whose processor does not come to the same gradient twice, or to another than the rest."""
    sequences = source.microbatch(0, 0)
    pairs = comm.all_gather_object([step.fingerprint(sequences) for _ in range(2)])
    unsteady = [rank for rank, (first, second) in enumerate(pairs) if first != second]
    if unsteady:
        return f"Computing one microbatch twice, {names(unsteady)} came to two results: that processor is broken"
    if len({first for first, _ in pairs}) > 1:
        return "From one state and one microbatch the ranks come to different gradients: a processor is broken"
    return "Computing one microbatch again, all came to the same gradient: it was memory, or has passed"
