"""Causal self-attention: several heads, keys and values shared by groups of them, rotary positions.

Grouped-query attention: Ainslie et al. 2023. Rotary positions: Su et al. 2021; the two halves of a head's width are the
two coordinates that are turned, as in the weights that the Hugging Face library exchanges.

Shapes: B batch, T tokens, H heads, K heads of keys and values, D width of a head, C = H D model dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpipar.model.config import ModelConfig
from mpipar.model.families import FAMILIES

Rotation = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Each token looks at itself and at those before it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.grouped = config.num_kv_heads != config.heads
        bias = FAMILIES[config.family].bias
        kv_dim = config.num_kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, config.dim, bias=bias)
        self.wk = nn.Linear(config.dim, kv_dim, bias=bias)
        self.wv = nn.Linear(config.dim, kv_dim, bias=bias)
        self.wo = nn.Linear(config.dim, config.dim, bias=bias)

    def forward(self, x: Tensor, rotation: Rotation | None, documents: Tensor | None = None) -> Tensor:
        """[B, T, C] -> [B, T, C].

        Args:
            x: What the tokens are so far.
            rotation: `rotary_table`'s, or None where positions are in `x` already.
            documents: The lengths of the documents, see `document_lengths`; None if each sequence is one.
        """
        q = self.wq(x).unflatten(-1, (-1, self.head_dim))  # [B, T, H, D]
        k = self.wk(x).unflatten(-1, (-1, self.head_dim))  # [B, T, K, D]
        v = self.wv(x).unflatten(-1, (-1, self.head_dim))  # [B, T, K, D]
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        y = self._attend(q, k, v) if documents is None else self._attend_within(documents, q, k, v)  # [B, T, H, D]
        out: Tensor = self.wo(y.flatten(2))
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=self.grouped
        )
        return y.transpose(1, 2)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # which would compile it anew for all lengths
    def _attend_within(self, documents: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One document after the other: no mask of T x T elements, and no product with what it would hide."""
        lengths = documents.tolist()
        pieces = zip(*(x.flatten(0, 1).split(lengths) for x in (q, k, v)), strict=True)
        y = torch.cat([self._attend(q[None], k[None], v[None])[0] for q, k, v in pieces])  # [B T, H, D]
        return y.view_as(q)


def rotary_table(num_tokens: int, head_dim: int, theta: float, like: Tensor) -> Rotation:
    """Cosines and sines [T, 1, D / 2] of the angle t theta^(-2 i / D) of position t and pair i, on `like`'s device.

    Made anew for each forward pass, which costs next to nothing: a buffer would be rounded with the model when that is
    moved to another dtype, and angles do not bear it. float64 for a float64 model, float32 for every other.
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64, device=like.device)  # [D / 2]
    tokens = torch.arange(num_tokens, dtype=torch.float64, device=like.device)  # [T]
    angles = torch.outer(tokens, theta ** (-pairs / head_dim)).unsqueeze(1)
    dtype = torch.promote_types(like.dtype, torch.float32)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turns each pair (x[i], x[i + D / 2]) of [B, T, H, D] by its angle, in the table's dtype; keeps the dtype of x."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)
