"""Initial weights as a function of (seed, parameter name) alone.

Each parameter has a generator of its own, seeded by a hash of the two. So neither the order in which a model is built,
nor what else it has, nor how it is cut among ranks changes what a parameter starts from; and every layout can be tested
against one process.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from mpipar.model.transformer import Transformer

# The projections that add to the residual stream, twice a layer.
_RESIDUAL = ("attention.wo.weight", "feed_forward.down.weight")


@torch.no_grad()
def initialise(model: Transformer, seed: int, *, std: float = 0.02) -> None:
    """Gives every parameter its initial value, drawn on the CPU in float32 whatever the model's device and dtype.

    Matrices are normal with deviation `std`; those that add to the residual stream are scaled by 1/sqrt(2 layers), so
    that its variance does not grow with depth (Radford et al. 2019). Norms start as the identity, biases as zero.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            scale = (2 * model.config.layers) ** -0.5 if name.endswith(_RESIDUAL) else 1.0
            parameter.copy_(_normal(seed, name, parameter.shape) * (std * scale))
        else:
            parameter.fill_(0.0 if name.endswith(".bias") else 1.0)


def _normal(seed: int, name: str, shape: torch.Size) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.randn(shape, generator=generator, dtype=torch.float32)
