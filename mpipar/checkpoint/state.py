"""The state of a model and its optimizer as tensors under their single-process names, and back.

weights/layers.3.attention.wq.weight
optimizer/layers.3.attention.wq.weight/exp_avg      and whatever else the optimizer keeps for a parameter
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mpipar.errors import CheckpointError

WEIGHTS = "weights/"
"""In front of the names of the model's parameters."""

_OPTIMIZER = "optimizer/"
_SHOWN = 3


def capture(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The model's parameters and the optimizer's state of each. Not copies: to be saved before the next step."""
    tensors: dict[str, Tensor] = {WEIGHTS + name: parameter for name, parameter in model.named_parameters()}
    for name, parameter in _optimized(model, optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{_OPTIMIZER}{name}/{key}"] = value
    return tensors


@torch.no_grad()
def restore(
    model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor], *, source: str = "the checkpoint"
) -> None:
    """Gives model and optimizer the state that was captured, to the bit; weights are written in place.

    The optimizer keeps its settings, such as learning rates: those are the configuration's.

    Args:
        tensors: An open checkpoint, or tensors that were captured.
        source: What an error calls them.

    Raises:
        CheckpointError: They are of another model, or damaged; either is found before anything is changed.
    """
    _check_fit(model, optimizer, tensors, source)
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[WEIGHTS + name])
    states: dict[str, dict[str, Tensor]] = {}
    for name in tensors:
        if name.startswith(_OPTIMIZER):
            owner, key = name.removeprefix(_OPTIMIZER).rsplit("/", 1)
            # The optimizer changes its state in place, and may keep the very tensor that it is given.
            states.setdefault(owner, {})[key] = tensors[name].clone()
    # By the optimizer's own way in, which knows on which device it wants each kind of state.
    layout: dict[str, Any] = optimizer.state_dict()
    numbered = enumerate(name for name, _ in _optimized(model, optimizer))
    layout["state"] = {number: states[name] for number, name in numbered if name in states}
    optimizer.load_state_dict(layout)


def _optimized(model: nn.Module, optimizer: Optimizer) -> list[tuple[str, nn.Parameter]]:
    """The optimizer's parameters with their names, in its order."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [(names[parameter], parameter) for group in optimizer.param_groups for parameter in group["params"]]


def _check_fit(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor], source: str) -> None:
    weights = {WEIGHTS + name: parameter for name, parameter in model.named_parameters()}
    optimized = dict(_optimized(model, optimizer))
    missing = [name for name in weights if name not in tensors]
    extra: list[str] = []
    different: list[str] = []
    num_parameters = 0
    for name in sorted(tensors, key=lambda name: not name.startswith(WEIGHTS)):  # weights are shown first
        tensor = tensors[name]  # which checks its checksums, if it lies in a file
        if name.startswith(WEIGHTS):
            num_parameters += tensor.numel()
            parameter: Tensor | None = weights.get(name)
        else:
            parameter = optimized.get(name.removeprefix(_OPTIMIZER).rpartition("/")[0])
        if parameter is None:
            extra.append(name)
        elif not _fits(name, tensor, parameter):
            different.append(f"{name} ({_describe(tensor)}, in the model {_describe(parameter)})")
    if missing or extra or different:
        raise CheckpointError(
            f"{source} is of another model, of {num_parameters:,} parameters where this one has "
            f"{sum(parameter.numel() for parameter in weights.values()):,}"
            + _listed("not in the checkpoint", missing)
            + _listed("not in the model", extra)
            + _listed("of another shape or dtype", different)
        )


def _fits(name: str, tensor: Tensor, parameter: Tensor) -> bool:
    if name.startswith(WEIGHTS):
        return tensor.shape == parameter.shape and tensor.dtype == parameter.dtype
    return tensor.dim() == 0 or tensor.shape == parameter.shape  # a count of steps, or a moment


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape)) or 'scalar'}"


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"; {what}: {', '.join(names[:_SHOWN])}{more}"
