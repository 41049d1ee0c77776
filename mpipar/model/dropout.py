"""Dropout whose mask is a function of (seed, step, microbatch, module name) and the kind of device alone.

So a microbatch has the same gradient on whatever rank it is computed, when it is computed again, and after a resume;
and activations that are recomputed in backward meet the same mask.

Srivastava et al. 2014.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


class Dropout(nn.Module):
    """Sets elements to zero with probability p, and scales the others by 1 / (1 - p). In training only.

    Args:
        p: The probability.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p
        self.key = ""  # of the microbatch and this module

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0 or not self.training:
            return x
        # Drawn where it is used; generators of other kinds of devices come to other masks.
        digest = hashlib.sha256(self.key.encode()).digest()
        generator = torch.Generator(x.device).manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        kept = torch.rand(x.shape, generator=generator, device=x.device) >= self.p
        return x * (kept.to(x.dtype) / (1 - self.p))


def begin_microbatch(model: nn.Module, seed: int, step: int, microbatch: int) -> None:
    """Says which microbatch the model is about to see."""
    for name, module in model.named_modules():
        if isinstance(module, Dropout):
            module.key = f"{seed}:{step}:{microbatch}:{name}"
