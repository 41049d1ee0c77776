"""Who started this process, from environments as the launchers leave them; and the doctor as a command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpipar.comm.environment import Launch, environ_outside, launcher_mismatch, read_launch, try_transfer

OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "8", "PMIX_RANK": "2"}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "4"}
SRUN = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}
BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    ("environ", "rank", "size"),
    [
        (OPEN_MPI, 2, 8),
        (HYDRA, 3, 4),
        (SRUN, 1, 4),
        ({**SRUN, "PMI_RANK": "1", "PMI_SIZE": "4"}, 1, 4),
        # The daemons of mpirun are a step of srun, one a host, and the ranks inherit their variables.
        ({**SRUN, **OPEN_MPI, "SLURM_STEP_NUM_TASKS": "2"}, 2, 8),
    ],
)
def test_read_launch(environ: dict[str, str], rank: int, size: int) -> None:
    launch = read_launch(environ)
    assert launch is not None and (launch.rank, launch.size) == (rank, size)


@pytest.mark.parametrize("environ", [{}, BATCH_SCRIPT, {"PMI_RANK": "0"}, {"PMI_RANK": "zero", "PMI_SIZE": "4"}])
def test_nothing_launched_it(environ: dict[str, str]) -> None:
    assert read_launch(environ) is None
    assert launcher_mismatch(environ, 1, "MPI") is None


@pytest.mark.parametrize("environ", [OPEN_MPI, HYDRA, SRUN])
def test_many_ranks_are_one_job(environ: dict[str, str]) -> None:
    launch = read_launch(environ)
    assert launch is not None
    assert launcher_mismatch(environ, launch.size, "MPI") is None


def test_one_rank_that_was_launched_alone() -> None:
    alone = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
    assert read_launch(alone) == Launch("mpirun of Open MPI", 0, 1)
    assert launcher_mismatch(alone, 1, "MPI") is None


@pytest.mark.parametrize(
    ("environ", "problem", "remedy"),
    [
        (OPEN_MPI, "mpirun of Open MPI started 8 processes, but MPICH 5.0.2 sees 1 rank in each", "build mpi4py"),
        (SRUN, "srun started 4 processes", "mpirun in the batch script"),
        ({**SRUN, "PMI_RANK": "1", "PMI_SIZE": "4"}, "started 4 processes", "srun --mpi=pmix"),
        ({**SRUN, **OPEN_MPI}, "mpirun of Open MPI started 8 processes", "build mpi4py"),
    ],
)
def test_singletons_under_a_launcher(environ: dict[str, str], problem: str, remedy: str) -> None:
    mismatch = launcher_mismatch(environ, 1, "MPICH 5.0.2")
    assert mismatch is not None
    assert problem in mismatch[0] and remedy in mismatch[1]


def test_an_environment_for_a_new_mpirun() -> None:
    kept = {"PATH": "/bin", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_MCA_osc": "^ucx"}
    assert environ_outside({**OPEN_MPI, **HYDRA, **SRUN, **kept}) == kept


def test_a_transfer_between_two_processes() -> None:
    """With numpy: what the GPU's probe does, on any machine."""
    transfer = try_transfer("numpy")
    assert transfer.result == "works", transfer.detail
    assert transfer.detail.startswith("4 MiB in ")


def doctor(folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-m", "mpipar.doctor"],
        cwd=folder,
        env={**environ_outside(os.environ), "PYTHONPATH": str(root), **environ},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command(tmp_path: Path) -> None:
    done = doctor(tmp_path)
    lines = [line for line in done.stdout.splitlines() if not line.startswith("       -> ")]
    assert done.returncode == 0, done.stderr
    assert len(lines) > 8 and all(line.startswith(("[ok]   ", "[note] ")) for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_the_command_under_a_launcher_of_another_mpi(tmp_path: Path) -> None:
    first = doctor(tmp_path, SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="4")
    assert first.returncode == 1 and first.stdout.startswith("[bad]  srun started 4 processes")
    second = doctor(tmp_path, SLURM_PROCID="1", SLURM_STEP_NUM_TASKS="4")
    assert second.returncode == 1 and second.stdout == ""
