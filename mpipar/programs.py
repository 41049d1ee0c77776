"""Where programs are. Which mpirun is the right one is decided by the Python beside it: both belong to one MPI."""

from __future__ import annotations

import os
import shutil
import sys


def find_program(name: str, beside: str = sys.executable) -> str | None:
    """The path of a program: in the folder of another one, or else the first on the PATH; None if there is none.

    Args:
        name: What it is called.
        beside: The path of the other one; this Python unless something else is said.
    """
    return shutil.which(name, path=os.path.dirname(beside)) or shutil.which(name)
