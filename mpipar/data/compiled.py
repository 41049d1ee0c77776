"""What setup.py has compiled of this package, if it found a compiler: libraries of plain C; all works without them."""

from __future__ import annotations

import ctypes
import importlib.machinery
from functools import lru_cache
from pathlib import Path


@lru_cache
def library(name: str) -> ctypes.CDLL | None:
    """The library of this name, such as "_words"; None if it was not built."""
    here = Path(__file__).parent
    built = [here / f"{name}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    found = next((path for path in built if path.exists()), None)
    return None if found is None else ctypes.CDLL(str(found))
