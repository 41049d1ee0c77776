"""How arrays on GPUs are carried: what the user asks for.

MPIPAR_CUDA, the same on all ranks:

    auto      ipc where the ranks of one host can open each other's memory, staged for all else
    ipc       the same, and an error where they cannot
    staged    through the memory of the host, always
    mpi       pointers to the device are handed to MPI, if it takes them: two processes of their own try it first
"""

from __future__ import annotations

from typing import Literal

Transport = Literal["auto", "ipc", "staged", "mpi"]

VARIABLE = "MPIPAR_CUDA"
