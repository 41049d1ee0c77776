"""The few functions that are compiled, because Python is too slow for them.

    comm/adding.c      sums over several arrays       comm/adding.py
    comm/rounding.c    sums that do not round         comm/exact.py
    data/words.c       words, remembered and merged   data/words.py, merges.py
    data/sketch.c      sketches of documents          data/dedup.py

They are plain C, in one library that setup.py builds where it finds a compiler. Each has a counterpart that gives the
same bits; without the library that one is used. comm/meeting.c, sums on a host, is a module by itself.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any


def function(name: str, result: type[Any] | None, *arguments: type[Any]) -> Callable[..., Any] | None:
    """A function of the library, or None if that was not built, or is older than the function.

    Args:
        name: Without the "mpipar_" in front.
        result: Of ctypes, like the arguments; None for a function that returns nothing.
        arguments: What it takes.
    """
    library = _library()
    if library is None or not hasattr(library, f"mpipar_{name}"):
        return None
    found = library[f"mpipar_{name}"]  # a new object each time, whose types are its own
    found.restype = result
    found.argtypes = arguments
    return found


def is_built() -> bool:
    """Whether the library is there."""
    return _library() is not None


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    here = Path(__file__).parent
    built = [here / f"_compiled{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    found = next((path for path in built if path.exists()), None)
    return None if found is None else ctypes.CDLL(str(found))
