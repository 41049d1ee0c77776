"""How elements of torch's dtypes are stored: as they are, or, where numpy has no such dtype, as integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

_INTEGERS: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.uint16),
    4: np.dtype(np.uint32),
    8: np.dtype(np.uint64),
}


def name_of(dtype: torch.dtype) -> str:
    """float32, bfloat16, ..."""
    return str(dtype).removeprefix("torch.")


def named(name: str) -> torch.dtype:
    """The dtype of a name. Raises ValueError if there is none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch has no dtype {name!r}")
    return dtype


def itemsize(name: str) -> int:
    """Bytes of an element."""
    return named(name).itemsize


def stored(name: str) -> np.dtype[Any]:
    """The dtype of the data set."""
    dtype = named(name)
    try:
        array: np.ndarray[Any, np.dtype[Any]] = torch.empty(0, dtype=dtype).numpy()
    except TypeError:  # bfloat16, float8, ...
        return np.dtype(_INTEGERS[dtype.itemsize])
    return array.dtype
