"""What a rank finds out by looking and by trying; nothing here says whether it is good."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch

import mpipar
from mpipar import compiled
from mpipar.comm import Communicator, Grid, Mesh, one_call, usable_cores
from mpipar.comm.environment import MpiFacts, mpi_facts
from mpipar.processor import bf16_is_fast
from mpipar.train.device import Seen


@dataclass(frozen=True)
class RankFacts:
    """What one rank knows.

    Args:
        host: The name of its host.
        cores: The cores it may run on.
        threads: How many threads torch takes by default.
        cores_per_rank: How many of them are its share.
        software: Version by name, of what should be the same on all ranks.
        mpi: Its MPI library.
        fast_bf16: Whether its processor multiplies bfloat16 in hardware.
        compiled_library: Whether what `compiled` lists is there.
        compiled_sums: Whether sums on a host are one compiled call.
        shm_bytes: The free room in /dev/shm, and its size; None if there is none.
        sees_folder: Whether a file that rank 0 made in its working directory is there for this rank.
        devices: The GPUs that it sees.
    """

    host: str
    cores: frozenset[int]
    threads: int
    cores_per_rank: int
    software: dict[str, str]
    mpi: MpiFacts
    fast_bf16: bool
    compiled_library: bool
    compiled_sums: bool
    shm_bytes: tuple[int, int] | None
    sees_folder: bool
    devices: Seen


@dataclass(frozen=True)
class FolderFacts:
    """What came of writing into a folder.

    Args:
        path: The folder.
        file_system: Its type, such as ext4, nfs4 or lustre.
        free_bytes: The room that is left.
        write_error: Why nothing can be written; empty if it can.
        lock_error: Why HDF5 cannot lock a file; empty if it can.
        hdf5: The version of HDF5 that was tried.
    """

    path: str
    file_system: str
    free_bytes: int
    write_error: str
    lock_error: str
    hdf5: str


def rank_facts(world: Communicator) -> RankFacts:
    """This rank's facts. Collective."""
    mesh = Mesh(world, Grid.of(world.size))
    return RankFacts(
        host=platform.node(),
        cores=frozenset(usable_cores()),
        threads=torch.get_num_threads(),
        cores_per_rank=mesh.cores_per_rank,
        software={
            "mpipar": mpipar.__version__,
            "Python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "h5py": h5py.__version__,
        },
        mpi=mpi_facts(),
        fast_bf16=bf16_is_fast(),
        compiled_library=compiled.is_built(),
        compiled_sums=one_call.is_built(),
        shm_bytes=_shared_memory(),
        sees_folder=_sees_folder_of_root(world),
        devices=Seen.here(),
    )


def folder_facts(path: Path) -> FolderFacts:
    """Writes, locks and removes a small HDF5 file in the folder."""
    write_error = lock_error = ""
    try:
        with tempfile.TemporaryDirectory(prefix=".mpipar-doctor-", dir=path) as scratch:
            Path(scratch, "written").write_bytes(b"x")
            try:
                with h5py.File(Path(scratch, "locked.h5"), "w", locking=True) as file:
                    file["x"] = 1
            except OSError as error:
                lock_error = str(error)
    except OSError as error:
        write_error = error.strerror or str(error)
    free_bytes = shutil.disk_usage(path).free
    return FolderFacts(str(path), _file_system(path), free_bytes, write_error, lock_error, h5py.version.hdf5_version)


def _sees_folder_of_root(world: Communicator) -> bool:
    """Whether a file that rank 0 makes where it works is there for this rank. Collective."""
    name = None
    if world.rank == 0:
        try:
            handle, name = tempfile.mkstemp(prefix=".mpipar-doctor-", dir=Path.cwd())
            os.close(handle)
        except OSError:
            name = None  # `folder_facts` says why; nothing can be said about the others
    name = world.broadcast_object(name)
    if name is None:
        return True
    seen = Path(name).exists()
    world.barrier()
    if world.rank == 0:
        os.unlink(name)
    return seen


def _file_system(path: Path) -> str:
    """The type of the file system of a folder: that of the longest mount point above it."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    above = [(mount, kind) for mount, kind in mounts if path.resolve().is_relative_to(mount)]
    return max(above, key=lambda pair: len(pair[0]))[1] if above else "unknown"


def _shared_memory() -> tuple[int, int] | None:
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return None
    return usage.free, usage.total
