"""What the MPI, the launcher and the host of this process are. Facts, for `python -m mpipar.doctor` and for messages.

What launched a process, and as which one of how many, is read from its environment by pure functions: that still
works where MPI does not.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mpipar.comm.mpi import MPI, mpi_version
from mpipar.errors import ConfigError
from mpipar.programs import find_program

# Launcher, and the variables with the number of the process and the number of processes. The innermost comes first: the
# daemons of Open MPI and MPICH are themselves started by srun, and what srun says of them reaches the ranks.
OPEN_MPI = "mpirun of Open MPI"
LAUNCHERS = (
    (OPEN_MPI, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("a PMI launcher (mpiexec of MPICH, srun)", "PMI_RANK", "PMI_SIZE"),
    ("jsrun", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE"),
    ("flux", "FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)

# What `mpirun --with-ft ulfm` sets for its ranks. Setting it by hand does not turn ULFM on.
_ULFM_IS_ON = "OMPI_MCA_mpi_ft_enable"


@dataclass(frozen=True)
class Launch:
    """What a launcher says of this process.

    Args:
        launcher: Its name, for people.
        rank: The number of this process, from 0.
        size: How many it has started.
    """

    launcher: str
    rank: int
    size: int


def read_launch(environ: Mapping[str, str]) -> Launch | None:
    """What the environment says of how this process was started; None if nothing launched it."""
    for launcher, rank, size in LAUNCHERS:
        if environ.get(rank, "").isdecimal() and environ.get(size, "").isdecimal():
            return Launch(launcher, int(environ[rank]), int(environ[size]))
    return None


def launcher_mismatch(environ: Mapping[str, str], world_size: int, mpi: str) -> tuple[str, str] | None:
    """Why n processes are n jobs of one rank each, not one job of n ranks, and what to do; None if all is well.

    Args:
        environ: The environment of the process.
        world_size: How many ranks MPI sees.
        mpi: The MPI library, for the message.
    """
    launch = read_launch(environ)
    if launch is None or world_size > 1 or launch.size == 1:
        return None
    count = launch.size
    problem = f"{launch.launcher} started {count} processes, but {mpi} sees 1 rank in each: {count} jobs, not one"
    if "SLURM_STEP_NUM_TASKS" in environ and launch.launcher != OPEN_MPI:
        return problem, "call mpirun in the batch script, or give srun a PMI that this MPI speaks: srun --mpi=pmix"
    return problem, "start with the mpirun that belongs to this MPI, or build mpi4py for the other (see setup-env.sh)"


ThreadLevel = Literal["single", "funneled", "serialized", "multiple"]


@dataclass(frozen=True)
class MpiFacts:
    """The MPI library of this process.

    Args:
        library: Its name and version.
        standard: The MPI standard it implements.
        thread_level: Which threads may call it, as it was granted.
        largest_tag: MPI_TAG_UB.
        fault_tolerance: Whether survivors can go on without a lost rank: the library cannot, it could if the job were
            started for it, or it can now.
    """

    library: str
    standard: tuple[int, int]
    thread_level: ThreadLevel
    largest_tag: int
    fault_tolerance: Literal["absent", "off", "on"]


def mpi_facts() -> MpiFacts:
    """The MPI library of this process."""
    return MpiFacts(
        library=mpi_version(),
        standard=MPI.Get_version(),
        thread_level=_thread_level(),
        largest_tag=int(MPI.COMM_WORLD.Get_attr(MPI.TAG_UB) or 0),
        fault_tolerance=_fault_tolerance(),
    )


def _thread_level() -> ThreadLevel:
    levels: dict[int, ThreadLevel] = {
        MPI.THREAD_SINGLE: "single",
        MPI.THREAD_FUNNELED: "funneled",
        MPI.THREAD_SERIALIZED: "serialized",
        MPI.THREAD_MULTIPLE: "multiple",
    }
    return levels[MPI.Query_thread()]


def require_other_threads() -> None:
    """Before a GPU is used: backward has a thread of torch's there, and its hooks call MPI while the main one waits.

    Raises:
        ConfigError: MPI may be called from the main thread only.
    """
    level = _thread_level()
    if level in ("single", "funneled"):
        raise ConfigError(
            f"{mpi_version()} runs at thread level {level!r}: only the main thread may call it, and on a GPU torch has "
            "another for backward, which starts reductions. It takes 'serialized', for which mpipar asks: import "
            "mpipar before mpi4py.MPI and leave mpi4py.rc as it is, or use an MPI with thread support"
        )


def can_survive() -> bool:
    """Whether this job was started to go on without ranks that die."""
    return os.environ.get(_ULFM_IS_ON) == "1"


def _fault_tolerance() -> Literal["absent", "off", "on"]:
    """ULFM: Open MPI 5 has it and uses it under `mpirun --with-ft ulfm`. MPICH has the calls, but not the survival."""
    if "Open MPI" not in mpi_version():
        return "absent"
    try:
        MPI.COMM_SELF.Get_failed()
    except (NotImplementedError, MPI.Exception):
        return "absent"
    return "on" if can_survive() else "off"


@dataclass(frozen=True)
class GpuTransfer:
    """Whether MPI takes an array in the memory of a GPU.

    Args:
        result: Nothing to try it with; tried, and the array arrived; tried, and it did not.
        detail: The device and the time, or what is missing, or what happened.
    """

    result: Literal["untried", "works", "fails"]
    detail: str


NO_DEVICE = "no CUDA device"


def try_gpu_transfer() -> GpuTransfer:
    """Sends an array between the GPUs of two processes of their own: an MPI that cannot do it often crashes."""
    has_driver = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None
    try:
        import cupy
    except ImportError:
        missing = (
            "CuPy is missing: pip install 'mpipar[cuda12]' or 'mpipar[cuda13]'" if has_driver else "no CUDA device"
        )
        return GpuTransfer("untried", missing)
    try:
        name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    except cupy.cuda.runtime.CUDARuntimeError:
        return GpuTransfer("untried", NO_DEVICE)
    transfer = try_transfer("cupy")
    return GpuTransfer(transfer.result, f"{name}, {transfer.detail}")


def try_transfer(library: Literal["cupy", "numpy"], timeout_s: float = 60.0) -> GpuTransfer:
    """Two processes under an mpirun of their own send one another an array of this library."""
    mpirun = find_program("mpirun")
    if mpirun is None:
        return GpuTransfer("untried", "there is no mpirun to try it with")
    command = [mpirun, "-n", "2", sys.executable, "-m", "mpipar.comm.transfer", library]
    try:
        done = subprocess.run(
            command, env=environ_outside(os.environ), capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return GpuTransfer("fails", f"nothing arrived in {timeout_s:.0f} s")
    if done.returncode == 0 and "arrived: " in done.stdout:
        return GpuTransfer("works", done.stdout.partition("arrived: ")[2].splitlines()[0])
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip(" -")]
    return GpuTransfer("fails", said[-1].strip() if said else f"exit code {done.returncode}")


def environ_outside(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment less what a launcher and a batch system put there: a new mpirun then starts on this host only."""
    launcher = ("OMPI_COMM_", "OMPI_MCA_num_procs", "PMIX_", "PMI_", "PRTE_LAUNCHED", "HYDI_", "MPI_LOCAL")
    batch_system = ("SLURM_", "PBS_", "LSB_")
    return {name: value for name, value in environ.items() if not name.startswith(launcher + batch_system)}


def usable_cores() -> set[int]:
    """On which this process may run."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))  # macOS binds no process
