"""The same windows in a litdata data set (Lightning AI), where litdata is installed: `pip install litdata`.

MosaicML's streaming is no peer here: it cannot be had without torchvision, and that not without a torch of its own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_CHUNK_WINDOWS = 512  # 2 MiB of 16-bit tokens


def open_litdata(folder: Path, windows: Sequence[NDArray[Any]]) -> Callable[[int], NDArray[Any]] | str:
    """Writes the windows and opens them: what gives the one with a number, or why there is none.

    Args:
        folder: Where they are written; made.
        windows: [num_windows][length], tokens.
    """
    if importlib.util.find_spec("litdata") is None:
        return "not installed"
    from litdata import StreamingDataset
    from litdata.streaming import Cache
    from litdata.streaming.item_loader import TokensLoader

    length = windows[0].size
    folder.mkdir()
    cache = Cache(str(folder), chunk_size=_CHUNK_WINDOWS * length, item_loader=TokensLoader(length))
    for number, window in enumerate(windows):
        cache[number] = torch.from_numpy(window)
    cache.done()
    cache.merge()
    samples = StreamingDataset(str(folder), item_loader=TokensLoader(length))
    return lambda number: np.asarray(samples[number])
