"""Which mpirun there is, and how it is to be called. What an MPI can do it says of itself, in a process of its own."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mpipar.errors import ConfigError, LaunchError
from mpipar.launch.hosts import Host
from mpipar.programs import find_program

Kind = Literal["Open MPI", "Hydra", "unknown"]


@dataclass(frozen=True)
class Mpirun:
    """A launcher.

    Args:
        path: The program.
        kind: Open MPI's, Hydra (of MPICH and its relatives), or another.
        survives: Whether it can start a job whose ranks survive the death of others.
    """

    path: str
    kind: Kind
    survives: bool

    def command(
        self, ranks: int, hosts: Sequence[Host], command: Sequence[str], *, more: str, variables: Sequence[str]
    ) -> list[str]:
        """The command line of a job.

        Args:
            ranks: How many.
            hosts: Where; none leaves it to mpirun.
            command: What a rank runs.
            more: Further arguments for mpirun, as a shell would read them.
            variables: Names of the environment variables that all ranks are to have.
        """
        arguments = [self.path]
        if self.kind != "unknown":
            arguments += ["--bind-to", "none"]  # the run gives each rank's threads its share of the host's cores
        if self.survives:
            arguments += ["--with-ft", "ulfm"]
        if self.kind == "Open MPI":  # Hydra passes on all there are
            arguments += [argument for name in variables for argument in ("-x", name)]
        if hosts:
            arguments += ["-hosts" if self.kind == "Hydra" else "--host", ",".join(map(str, hosts))]
        return [*arguments, *shlex.split(more), "-n", str(ranks), *command]

    def variables(self, files: Path, shared_memory: Path, agent: str | None) -> dict[str, str]:
        """Environment variables that move the files of this MPI into folders that can be removed after a crash.

        Args:
            files: For small ones. It is made on every host.
            shared_memory: For those that are memory; `mpipar.comm` makes it on every host.
            agent: What mpirun is to reach hosts with.
        """
        if self.kind != "Open MPI":
            return {}
        own = {
            "PRTE_MCA_prte_tmpdir_base": str(files),
            "OMPI_MCA_btl_sm_backing_directory": str(shared_memory),
            "OMPI_MCA_osc_sm_backing_directory": str(shared_memory),
        }
        return own if agent is None else {**own, "PRTE_MCA_plm_ssh_agent": agent}


def find_mpirun(wish: str | None, *, survives: bool) -> Mpirun:
    """The launcher of this environment.

    Args:
        wish: The program that was asked for; None for the one beside this Python, or else the first on the PATH.
        survives: Whether fault tolerance is wanted.

    Raises:
        ConfigError: The one that was asked for is not there.
        LaunchError: There is none.
    """
    path = shutil.which(wish) if wish else find_program("mpirun")
    if path is None and wish:
        raise ConfigError(f"--mpirun {wish} is not there")
    if path is None:
        raise LaunchError("there is no mpirun: activate .venv, or load the module of an MPI")
    kind = _kind(_said_by(path, "--version"))
    return Mpirun(path, kind, survives and kind == "Open MPI" and _has_ulfm(path))


def _kind(version: str) -> Kind:
    return "Open MPI" if "Open MPI" in version else "Hydra" if "HYDRA" in version.upper() else "unknown"


def _has_ulfm(mpirun: str) -> bool:
    """Whether this Open MPI was built with fault tolerance: version 5 usually is."""
    info = find_program("ompi_info", beside=mpirun)
    return info is not None and "FT MPI support: yes" in _said_by(info)


def _said_by(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def forwarded(own: Mapping[str, str]) -> list[str]:
    """Those of our variables that ranks read themselves; mpirun takes care of its own."""
    return [name for name in own if name.startswith("MPIPAR_")]
