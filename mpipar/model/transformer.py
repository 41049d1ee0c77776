"""A decoder-only transformer, pre-norm, of any family in `families`.

    embedding -> layers x (x + attention(norm(x)), x + feed_forward(norm(x))) -> norm -> head

Shapes: B batch, T tokens, C model dim, F width of the feed-forward network, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mpipar.errors import ConfigError
from mpipar.model.attention import Attention, Rotation, rotary_table
from mpipar.model.config import ModelConfig
from mpipar.model.documents import document_lengths, positions_within
from mpipar.model.dropout import Dropout
from mpipar.model.families import FAMILIES

_NOT_COUNTED = -100  # no id of a token


class Transformer(nn.Module):
    """The model. Its weights mean nothing until `initialise` or a checkpoint gives them values.

    Args:
        config: The shape.
        vocab_size: Number of token ids, which the tokenizer of the data says.
        checkpoint_activations: Keep only the inputs of each layer for the backward pass and compute the rest again:
            a third more computation for a fraction of the memory, with the same result.
    """

    def __init__(self, config: ModelConfig, *, vocab_size: int, checkpoint_activations: bool = False):
        super().__init__()
        family = FAMILIES[config.family]
        self.config = config
        self.vocab_size = vocab_size
        self.checkpoint_activations = checkpoint_activations
        # What the weight of a tied embedding passes through to be the head's.
        self.as_head: Callable[[Tensor], Tensor] = lambda weight: weight
        self.embedding = nn.Embedding(vocab_size, config.dim)
        self.positions = None if family.rotary else nn.Embedding(config.max_seq_len, config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.dropout = Dropout(config.dropout)
        self.norm = family.norm(config.dim, eps=config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.dim, vocab_size, bias=False)

    def forward(self, tokens: Tensor, begins: Tensor | None = None) -> Tensor:
        """Token ids [B, T] int64 -> logits [B, T, V] of the token that follows each.

        Args:
            tokens: The ids.
            begins: bool [B, T], which tokens begin a document: they, and those after them, do not look at what is
                before, and positions count from them. None if each sequence is one document.
        """
        num_tokens = tokens.shape[1]
        if num_tokens > self.config.max_seq_len:
            raise ConfigError(
                f"a sequence of {num_tokens} tokens is longer than --model.max-seq-len {self.config.max_seq_len}"
            )
        x = self.embedding(tokens)  # [B, T, C]
        documents = positions = rotation = None
        if begins is not None:
            documents, positions = document_lengths(begins), positions_within(begins)
        if self.positions is None:
            rotation = rotary_table(num_tokens, self.config.head_dim, self.config.rope_theta, like=x)
            if positions is not None:
                rotation = rotation[0][positions], rotation[1][positions]  # [B, T, 1, D / 2]
        elif positions is None:
            x = x + self.positions.weight[:num_tokens]
        else:
            x = x + self.positions(positions)
        x = self.dropout(x)
        for layer in self.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                # Dropout comes to the same mask again by itself, so no generator's state has to be kept. The
                # non-reentrant kind lets the hooks that announce gradients fire once for each parameter.
                x = checkpoint(layer, x, rotation, documents, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, rotation, documents)
        weight = self.as_head(self.embedding.weight) if self.head is None else self.head.weight
        return F.linear(self.norm(x), weight)

    def loss(
        self, tokens: Tensor, begins: Tensor | None = None, counted: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The cross-entropy of predicting each token of [B, T + 1] from those before it.

        Args:
            tokens: The ids, int64 [B, T + 1].
            begins: bool [B, T], which tokens begin a document, as in `forward`.
            counted: bool [B, T], the tokens from which the next one's prediction counts; None for all.

        Returns:
            The sum over the predicted tokens that count, in nats, a scalar in float32 (float64 for a float64 model);
            and their number, a scalar in int64 on the device of the tokens, where nobody has to wait for it.
        """
        targets = tokens[:, 1:].flatten()
        if counted is None:
            num_targets = torch.full((), targets.numel(), device=tokens.device)
        else:
            targets, num_targets = targets.masked_fill(~counted.flatten(), _NOT_COUNTED), counted.sum()
        logits = self(tokens[:, :-1], begins).flatten(0, 1)
        # In half precision a sum over thousands of tokens would keep three digits.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, reduction="sum", ignore_index=_NOT_COUNTED), num_targets

    def num_parameters(self) -> int:
        """Number of parameters; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations of forward and backward for one token of a sequence of `seq_len`.

        Counted as Chowdhery et al. 2022 (PaLM, appendix B) do: 6 for each weight that multiplies and 12 T C a layer for
        attention, as if it looked at all tokens; nothing for what activation checkpointing computes again.
        """
        tables = [self.positions, None if self.head is None else self.embedding]  # looked up, not multiplied
        multiplied = self.num_parameters() - sum(table.weight.numel() for table in tables if table is not None)
        return 6 * multiplied + 12 * self.config.layers * self.config.dim * seq_len


class Layer(nn.Module):
    """Attention and feed-forward network, each on the norm of the residual stream, to which it adds (after dropout)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        norm = FAMILIES[config.family].norm
        self.attention_norm = norm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = norm(config.dim, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.attention_dropout = Dropout(config.dropout)
        self.feed_forward_dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, rotation: Rotation | None, documents: Tensor | None = None) -> Tensor:
        x = x + self.attention_dropout(self.attention(self.attention_norm(x), rotation, documents))
        out: Tensor = x + self.feed_forward_dropout(self.feed_forward(self.feed_forward_norm(x)))
        return out


class FeedForward(nn.Module):
    """[B, T, C] -> [B, T, F] -> [B, T, C], token by token."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        family = FAMILIES[config.family]
        self.activation = family.activation
        self.gate = nn.Linear(config.dim, config.ffn_width, bias=family.bias) if family.gated else None
        self.up = nn.Linear(config.dim, config.ffn_width, bias=family.bias)
        self.down = nn.Linear(config.ffn_width, config.dim, bias=family.bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        hidden = self.activation(hidden) if self.gate is None else self.activation(self.gate(x)) * hidden
        out: Tensor = self.down(hidden)
        return out
