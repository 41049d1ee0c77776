"""The shape of a model, checked when it is built. The vocabulary is no part of it: its size comes from the data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from mpipar.errors import ConfigError
from mpipar.model.families import FAMILIES


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of the transformer."""

    family: Literal["llama", "gpt2"] = "llama"
    """llama: RMSNorm, rotary positions, SwiGLU. gpt2: LayerNorm, learned positions, GELU, biases."""

    layers: int = 4
    """Number of transformer layers."""

    dim: int = 256
    """Width of the residual stream."""

    heads: int = 4
    """Number of attention heads; the model dim is a multiple of it."""

    kv_heads: int | None = None
    """Number of key and value heads, each shared by an equal number of heads; as many as heads if not given."""

    ffn_dim: int | None = None
    """Width of the feed-forward network; the family's rule if not given (llama: 8/3 dim up to a multiple of 64,
    gpt2: 4 dim)."""

    max_seq_len: int = 1024
    """Longest sequence that the model takes."""

    tied: bool = True
    """The output head shares the weights of the embedding, as in GPT-2 and in small Llamas; false: it has its own."""

    rope_theta: float = 10_000.0
    """Base of the wavelengths of rotary positions; without effect on gpt2."""

    dropout: float = 0.0
    """Probability with which an element is set to zero on its way into the residual stream, in training."""

    norm_eps: float = 1e-5
    """Added to the variance in normalisations."""

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ConfigError(f"--model.family {self.family} is not known; choose one of {', '.join(FAMILIES)}")
        for name in ("layers", "dim", "heads", "kv_heads", "ffn_dim", "max_seq_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{_flag(name)} {value} must be at least 1")
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{_flag(name)} {value} must be positive")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"--model.dropout {self.dropout} must be in [0, 1)")
        if self.dim % self.heads:
            raise ConfigError(f"--model.dim {self.dim} is not a multiple of --model.heads {self.heads}")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ConfigError(f"--model.heads {self.heads} is not a multiple of --model.kv-heads {self.kv_heads}")
        if FAMILIES[self.family].rotary and self.head_dim % 2:
            raise ConfigError(
                f"--model.dim {self.dim} over --model.heads {self.heads} makes heads of width {self.head_dim}, where "
                f"rotary positions need an even width"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.heads

    @property
    def num_kv_heads(self) -> int:
        """Number of key and value heads as built."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def ffn_width(self) -> int:
        """Width of the feed-forward network as built."""
        return FAMILIES[self.family].ffn_dim(self.dim) if self.ffn_dim is None else self.ffn_dim

    def resolved(self) -> ModelConfig:
        """The same shape with nothing left to a rule: what is written beside a checkpoint."""
        return replace(self, kv_heads=self.num_kv_heads, ffn_dim=self.ffn_width)


def _flag(name: str) -> str:
    return "--model." + name.replace("_", "-")
