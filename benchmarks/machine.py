"""On what it was measured: the head of every table."""

from __future__ import annotations

import os
import platform
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version

import torch

import mpipar
from benchmarks.mpi_peer import waiting
from mpipar.comm import Communicator, Grid, Mesh, mpi_version
from mpipar.processor import processor_name

# Settings of MPI libraries, and of what carries their messages; less those that mpirun sets for itself.
_SETTINGS = ("OMPI_MCA_", "PMIX_MCA_", "PRTE_MCA_", "MPICH_", "MPIR_CVAR_", "I_MPI_", "MV2_", "UCX_", "FI_")
_OF_MPIRUN = ("OMPI_MCA_num_procs", "OMPI_MCA_initial_wdir", "OMPI_MCA_cpu_type", "OMPI_MCA_PREFIXES")


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What rank 0 sees of the job and of its host.

    Args:
        command: What was asked.
        date: The day, ISO 8601.
        versions: Of the programs that take part, by name.
        mpi: The MPI library.
        mpi_waiting: What its ranks do while they wait, where that can be chosen.
        mpi_settings: NAME=VALUE, of the environment.
        ranks: In the job.
        hosts: On which they are.
        threads: Of torch, a rank.
        cores: Of rank 0's host that its ranks may use.
        ranks_on_host: That share them.
        processor: What they are.
        system: Kernel and its version.
    """

    command: str
    date: str
    versions: dict[str, str]
    mpi: str
    mpi_waiting: str
    mpi_settings: list[str]
    ranks: int
    hosts: int
    threads: int
    cores: int
    ranks_on_host: int
    processor: str
    system: str

    def header(self) -> str:
        """As lines of comments."""
        hosts = f"{self.hosts} host{'' if self.hosts == 1 else 's'}"
        waits = f", {self.mpi_waiting}" if self.mpi_waiting else ""
        lines = [
            f"{self.command}    {self.date}",
            ", ".join([self.mpi, *(f"{name} {number}" for name, number in self.versions.items())]),
            f"{self.ranks} ranks on {hosts}, {self.threads} torch thread(s) a rank",
            f"{self.cores} x {self.processor}, {self.system}",
            f"MPI settings: {' '.join(self.mpi_settings) or 'none'}{waits}",
        ]
        if self.ranks_on_host > self.cores:
            lines.append("more ranks than cores: small sizes measure who hands the core to whom, not the algorithms")
        return comments(lines)


def comments(lines: list[str]) -> str:
    """Lines as comments of a table."""
    return "\n".join(f"# {line}" for line in lines)


def begin(world: Communicator) -> tuple[Mesh, Environment]:
    """Collective: what every question begins with: one torch thread a rank, the mesh, and what is measured on."""
    torch.set_num_threads(1)
    mesh = Mesh(world, Grid.of(world.size))
    cores = set().union(*mesh.host.all_gather_object(os.sched_getaffinity(0)))
    return mesh, Environment(
        command=" ".join(["python -m benchmarks", *sys.argv[1:]]),
        date=time.strftime("%Y-%m-%d"),
        versions=versions(),
        mpi=mpi_version(),
        mpi_waiting=waiting(),
        mpi_settings=mpi_settings(),
        ranks=world.size,
        hosts=mesh.num_hosts,
        threads=torch.get_num_threads(),
        cores=len(cores),
        ranks_on_host=mesh.host.size,
        processor=processor_name(),
        system=f"{platform.system()} {platform.release()}",
    )


def versions() -> dict[str, str]:
    """Of the programs that take part, by name."""
    others = {name: version(name) for name in ("mpi4py", "torch", "numpy")}
    return {"mpipar": mpipar.__version__, **others, "Python": platform.python_version()}


def mpi_settings() -> list[str]:
    """NAME=VALUE, of the environment."""
    return [f"{name}={value}" for name, value in sorted(os.environ.items()) if _is_setting(name)]


def _is_setting(name: str) -> bool:
    return name.startswith(_SETTINGS) and name not in _OF_MPIRUN
