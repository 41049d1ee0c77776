"""One number for the whole state of a run, by which anyone can compare two.

SHA-256 over all tensors, weights and optimizer state alike, in the order of their names; of each

    name, dtype and shape        such as "weights/norm.weight float32 512\n"
    the elements                 little-endian, row by row

However a model was cut, its tensors have their single-process names: two runs have one digest if and only if they came
to the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

_RUN_BYTES = 1 << 24


def digest(tensors: Mapping[str, Tensor]) -> str:
    """ "sha256:" and 64 digits.

    Args:
        tensors: Those of `capture`, or an open checkpoint.
    """
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        state.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {shape}\n".encode())
        for run in tensor.view(-1).view(torch.uint8).split(_RUN_BYTES):
            state.update(run.numpy())
    return f"sha256:{state.hexdigest()}"
