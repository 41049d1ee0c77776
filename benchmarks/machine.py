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
from mpipar.comm import Communicator, Grid, Mesh, mpi_version, usable_cores
from mpipar.processor import processor_name

# Settings of MPI libraries, and of what carries their messages; less those that mpirun sets for itself.
_SETTINGS = ("OMPI_MCA_", "PMIX_MCA_", "PRTE_MCA_", "MPICH_", "MPIR_CVAR_", "I_MPI_", "MV2_", "UCX_", "FI_")
_OF_MPIRUN = ("OMPI_MCA_num_procs", "OMPI_MCA_initial_wdir", "OMPI_MCA_cpu_type", "OMPI_MCA_PREFIXES")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a process sees of its host, and what it was asked for there.

    Args:
        command: What was asked.
        date: The day, ISO 8601.
        versions: Of the programs that take part, by name.
        mpi: The MPI library.
        mpi_settings: NAME=VALUE, of the environment.
        cores: Of the host that may be used.
        processor: What they are.
        system: Kernel and its version.
    """

    command: str
    date: str
    versions: dict[str, str]
    mpi: str
    mpi_settings: list[str]
    cores: int
    processor: str
    system: str

    def header(self) -> str:
        """As lines of comments."""
        return comments(self.lines())

    def lines(self) -> list[str]:
        """What was asked, the programs, the cores, settings."""
        return [
            f"{self.command}    {self.date}",
            ", ".join([self.mpi, *(f"{name} {number}" for name, number in self.versions.items())]),
            f"{self.cores} x {self.processor}, {self.system}",
            f"MPI settings: {' '.join(self.mpi_settings) or 'none'}",
        ]


@dataclass(frozen=True, kw_only=True)
class Environment(Machine):
    """What rank 0 sees of the job and of its host.

    Args:
        mpi_waiting: What ranks do while they wait, where that can be chosen.
        ranks: In the job.
        hosts: On which they are.
        threads: Of torch, a rank.
        ranks_on_host: That share the cores of rank 0's host.
    """

    mpi_waiting: str
    ranks: int
    hosts: int
    threads: int
    ranks_on_host: int

    def lines(self) -> list[str]:
        """With what is known of the ranks."""
        asked, programs, cores, settings = super().lines()
        hosts = f"{self.hosts} host{'' if self.hosts == 1 else 's'}"
        waits = f", {self.mpi_waiting}" if self.mpi_waiting else ""
        ranks = f"{self.ranks} ranks on {hosts}, {self.threads} torch thread(s) a rank"
        crowded = ["more ranks than cores: small sizes measure who hands the core to whom, not the algorithms"]
        lines = [asked, programs, ranks, cores, f"{settings}{waits}"]
        return lines + crowded if self.ranks_on_host > self.cores else lines


def comments(lines: list[str]) -> str:
    """Lines as comments of a table."""
    return "\n".join(f"# {line}" for line in lines)


def begin(world: Communicator) -> tuple[Mesh, Environment]:
    """Collective: what every question begins with: one torch thread a rank, the mesh, and what is measured on."""
    torch.set_num_threads(1)
    mesh = Mesh(world, Grid.of(world.size))
    cores = set().union(*mesh.host.all_gather_object(usable_cores()))
    return mesh, Environment(
        **vars(this_machine("benchmarks", len(cores))),
        mpi_waiting=waiting(),
        ranks=world.size,
        hosts=mesh.num_hosts,
        threads=torch.get_num_threads(),
        ranks_on_host=mesh.host.size,
    )


def this_machine(module: str, cores: int) -> Machine:
    """On what is measured, for the command `python -m MODULE` on so many cores."""
    others = {name: version(name) for name in ("mpi4py", "torch", "numpy")}
    return Machine(
        command=" ".join([f"python -m {module}", *sys.argv[1:]]),
        date=time.strftime("%Y-%m-%d"),
        versions={"mpipar": mpipar.__version__, **others, "Python": platform.python_version()},
        mpi=mpi_version(),
        mpi_settings=[f"{name}={value}" for name, value in sorted(os.environ.items()) if _is_setting(name)],
        cores=cores,
        processor=processor_name(),
        system=f"{platform.system()} {platform.release()}",
    )


def _is_setting(name: str) -> bool:
    return name.startswith(_SETTINGS) and name not in _OF_MPIRUN
