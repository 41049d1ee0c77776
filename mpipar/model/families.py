"""What tells one family of transformers from another, as data: the code of the model asks here and nowhere else.

llama   Touvron et al. 2023: RMSNorm, rotary positions, SwiGLU, no biases
gpt2    Radford et al. 2019: LayerNorm, learned positions, GELU, biases
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family."""

    norm: Callable[..., nn.Module]
    """Called as norm(dim, eps=...)."""

    rotary: bool
    """Positions turn the queries and keys; otherwise a learned vector is added to the embedding."""

    activation: Callable[[Tensor], Tensor]
    """The non-linearity of the feed-forward network."""

    gated: bool
    """The activation gates a second projection (Shazeer 2020) instead of standing alone."""

    bias: bool
    """Linear layers have biases."""

    ffn_dim: Callable[[int], int]
    """The width of the feed-forward network for a model dim."""


def _gated_ffn_dim(dim: int) -> int:
    # Three matrices instead of two: 2/3 of 4 dim has the same number of weights. A multiple of 64 suits the hardware.
    return -(-8 * dim // (3 * 64)) * 64


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(
            norm=nn.RMSNorm,
            rotary=True,
            activation=F.silu,
            gated=True,
            bias=False,
            ffn_dim=_gated_ffn_dim,
        ),
        "gpt2": Family(
            norm=nn.LayerNorm,
            rotary=False,
            activation=partial(F.gelu, approximate="tanh"),
            gated=False,
            bias=True,
            ffn_dim=lambda dim: 4 * dim,
        ),
    }
)
