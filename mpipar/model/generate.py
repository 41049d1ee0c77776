"""Text from a model, one token after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from mpipar.model.transformer import Transformer


@torch.no_grad()
def generate(
    model: Transformer,
    tokens: Tensor,
    num_new: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continues each sequence by `num_new` tokens, looking back at most `max_seq_len` of them.

    Each token costs a forward pass over the whole window: simple, and right for a sample at the end of a training run.

    Args:
        tokens: [B, T] int64 with T >= 1, on the model's device.
        temperature: Divides the logits: 0 takes the likeliest token, 1 samples what the model predicts.
        top_k: Sample among the k likeliest tokens only.
        generator: The source of randomness, on the model's device.

    Returns:
        [B, T + num_new].
    """
    if tokens.shape[1] == 0:
        raise ValueError("there must be at least one token to continue from")
    for _ in range(num_new):
        logits = model(tokens[:, -model.config.max_seq_len :])[:, -1].float()  # [B, V]
        tokens = torch.cat((tokens, _sample(logits, temperature, top_k, generator)), dim=1)
    return tokens


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token id for each row of [B, V], as [B, 1]."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None and top_k < logits.shape[-1]:
        logits, ids = logits.topk(top_k, dim=-1)
        return ids.gather(1, _sample(logits, temperature, None, generator))
    return torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)
