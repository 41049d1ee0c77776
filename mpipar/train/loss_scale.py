"""Dynamic loss scaling, for gradients in float16.

What is smaller than 2^-24 is nothing to float16, and many gradients are. So the loss is multiplied before backward, and
the gradients divided behind it. The scale falls by half when a gradient came out infinite or NaN, and that step changes
no weight; it doubles after `GROWTH_STEPS` good steps in a row.

Whether a step was good is a function of its reduced gradient, which is the same on all ranks, so their scales stay the
same without a word. The scale is a power of two: multiplying by it and dividing again changes no bit of what did not
leave the range.

Micikevicius et al., "Mixed Precision Training", ICLR 2018.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mpipar.model import Transformer

GROWTH_STEPS = 2000

# Exponents of the scale of a mean over tokens: where it begins, as in torch.amp.GradScaler, and between what it moves.
_FIRST, _LEAST, _MOST = 16, 0, 24


@dataclass
class LossScale:
    """The scale of the coming step.

    The loss of a microbatch is a sum over its tokens, and has gradients as many times as large as those of their mean;
    so its scale is that much smaller.

    Args:
        tokens: In a microbatch.

    Attributes:
        exponent: The scale is 2 to its power.
        good_steps: In a row, at this scale.
    """

    tokens: int

    def __post_init__(self) -> None:
        self._offset = math.ceil(math.log2(self.tokens))
        self.exponent = _FIRST - self._offset
        self.good_steps = 0

    @property
    def factor(self) -> float:
        """What the loss is multiplied by."""
        return 2.0**self.exponent

    @property
    def can_fall(self) -> bool:
        """Whether a gradient that is not finite may be the scale's fault."""
        return self.exponent > _LEAST - self._offset

    def move_on(self, *, finite: bool) -> None:
        """To the next step.

        Args:
            finite: Whether the reduced gradient of this one was.
        """
        if not finite:
            self.exponent -= self.can_fall
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps == GROWTH_STEPS:
            self.exponent = min(self.exponent + 1, _MOST - self._offset)
            self.good_steps = 0

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps of it: the scale of a mean, whatever the size of a microbatch."""
        return {"exponent": self.exponent + self._offset, "good_steps": self.good_steps}

    def restore(self, state: Mapping[str, int]) -> None:
        """Goes on from there; from a checkpoint of a run without a scale, from where it is."""
        self.exponent = state.get("exponent", self.exponent + self._offset) - self._offset
        self.good_steps = state.get("good_steps", 0)


def unscale_before_rounding(model: Transformer, scale: LossScale) -> None:
    """Has each gradient divided by the scale before it meets its grid (`parallel.exact`).

    Grids follow the gradients of the steps before. So they know nothing of the scale, and need not be moved with it.

    Args:
        model: With `as_head` as its replicas want it.
        scale: That of the loss, at each step.
    """

    def unscaled(gradient: Tensor) -> Tensor:
        return gradient * (1 / scale.factor)

    for parameter in model.parameters():
        parameter.register_hook(unscaled)
    if model.head is not None:
        return
    separate = model.as_head  # whose gradient goes past the parameter's hook

    def as_head(weight: Tensor) -> Tensor:
        used = separate(weight)
        if used.requires_grad:
            used.register_hook(unscaled)
        return used

    model.as_head = as_head
