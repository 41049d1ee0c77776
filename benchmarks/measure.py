"""Timing things against each other, and saying on what machine."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

import mpipar
from benchmarks.gloo import start_gloo
from mpipar.comm import Communicator, Grid, Mesh, mpi_version
from mpipar.errors import ConfigError

Times = dict[str, npt.NDArray[np.float64]]


def take_turns(
    world: Communicator,
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int,
    prepare: Callable[[str], object] = lambda name: None,
) -> Times:
    """Times each contestant once a round, one after the other, and starts each from a barrier.

    Args:
        world: The ranks that all run the same contestants.
        contestants: What is timed, by name.
        rounds: How many times are kept.
        warmup: Rounds that are not kept.
        prepare: Called with the contestant's name before each of its measurements, untimed.

    Returns:
        Seconds of the slowest rank, [rounds] by name. Times of one round were taken side by side.
    """
    times = {name: np.zeros(rounds) for name in contestants}
    for i in range(-warmup, rounds):
        for name, run in contestants.items():
            prepare(name)
            world.barrier()
            start = time.perf_counter()
            run()
            if i >= 0:
                times[name][i] = time.perf_counter() - start
    for name in contestants:
        world.all_reduce(times[name], "max")
    return times


def ratio(times: Times, name: str, reference: str) -> tuple[float, float, float]:
    """(median, lower quartile, upper quartile) over rounds of the time of `name` over that of `reference`."""
    quotients = times[name] / times[reference]
    low, middle, high = np.percentile(quotients, [25, 50, 75])
    return float(middle), float(low), float(high)


def begin(world: Communicator, rounds: int) -> None:
    """Collective: what every question with gloo among its peers begins with: one thread a rank, and the environment.

    Raises:
        ConfigError: There is nothing to take a median of.
    """
    if rounds < 1:
        raise ConfigError(f"--rounds {rounds} must be at least 1")
    torch.set_num_threads(1)
    mesh = Mesh(world, Grid.of(world.size))
    start_gloo(mesh)
    _print_environment(mesh)


def _print_environment(mesh: Mesh) -> None:
    """Says, on rank 0, what machine this is, as comments of a table."""
    if mesh.world.rank > 0:
        return
    print(f"# mpipar {mpipar.__version__}, {mpi_version()}, torch {torch.__version__}, numpy {np.__version__}")
    hosts = f"{mesh.num_hosts} host{'' if mesh.num_hosts == 1 else 's'}"
    print(f"# {mesh.world.size} ranks on {hosts}, {torch.get_num_threads()} torch thread(s) a rank")
    if mesh.host.size > len(os.sched_getaffinity(0)):
        print("# more ranks than cores: small sizes measure who hands the core to whom, not the algorithms")
    print(f"# {os.cpu_count()} x {_processor()}, {platform.system()} {platform.release()}", flush=True)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "processor")
