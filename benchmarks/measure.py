"""Timing things against each other."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from mpipar.comm import Communicator

Seconds = npt.NDArray[np.float64]
"""[rounds], of the slowest rank."""

# A measurement is long beside the clock's grain and the moments at which ranks leave a barrier, unless the slowest
# contestant would then hold up everybody.
_LEAST_S = 1e-3
_MOST_S = 0.2


def take_turns(
    world: Communicator,
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int,
    repeat: int = 1,
    prepare: Callable[[str], object] = lambda name: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Seconds]:
    """Times each contestant once a round, one after the other, and starts each from a barrier.

    Args:
        world: The ranks that all run the same contestants.
        contestants: What is timed, by name.
        rounds: How many times are kept.
        warmup: Rounds that are not kept.
        repeat: How often a contestant runs in one measurement, without a barrier between.
        prepare: Called with the contestant's name before each of its measurements, untimed.
        clock: Tells the time, in seconds.

    Returns:
        The time of one run, by name. Times of one round were taken side by side.
    """
    times = {name: np.zeros(rounds) for name in contestants}
    names = list(contestants)
    for i in range(-warmup, rounds):
        # Nobody always follows the same one, in whose cache it would find its array, or not.
        for name in random.Random(i).sample(names, len(names)):
            run = contestants[name]
            prepare(name)
            world.barrier()
            start = clock()
            for _ in range(repeat):
                run()
            if i >= 0:
                times[name][i] = (clock() - start) / repeat
    for name in contestants:
        world.all_reduce(times[name], "max")
    return times


def repetitions(world: Communicator, contestants: Mapping[str, Callable[[], object]]) -> int:
    """Collective: how often a measurement repeats what it times: the same for all contestants, on all ranks."""
    times = [float(seconds.min()) for seconds in take_turns(world, contestants, rounds=3, warmup=1).values()]
    return max(1, min(math.ceil(_LEAST_S / min(times)), int(_MOST_S / max(times))))


def ratio(times: Seconds, reference: Seconds) -> tuple[float, float, float]:
    """(median, lower quartile, upper quartile) over rounds of the one time over the other."""
    low, middle, high = np.percentile(times / reference, [25, 50, 75])
    return float(middle), float(low), float(high)
