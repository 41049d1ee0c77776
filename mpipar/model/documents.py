"""Documents in a sequence that attention keeps apart.

Several documents are packed into one sequence so that no place is empty. A token then looks at those of its own
document only, and its position counts from where that begins: the model computes what it would compute of the documents
one by one. In torch's words: sequences of variable length.

Shapes: B batch, T tokens, N documents.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]  # how many there are is not known before
def document_lengths(begins: Tensor) -> Tensor:
    """How long the documents are, one sequence after the other: bool [B, T] -> int64 [N], whose sum is B T.

    On the CPU, where attention is cut by them in every layer: a GPU is waited for here, and not there again. Every
    sequence begins a document, whether its first token is marked or not.
    """
    first = begins.clone()
    first[:, 0] = True
    at = first.flatten().nonzero().flatten()  # [N]
    return torch.diff(at.cpu(), append=torch.tensor([first.numel()]))


def positions_within(begins: Tensor) -> Tensor:
    """How many tokens of the same document, and sequence, are before each: bool [B, T] -> int64 [B, T]."""
    places = torch.arange(begins.shape[1], device=begins.device).expand(begins.shape)  # [B, T]
    return places - torch.where(begins, places, 0).cummax(dim=1).values
