"""What torch does on a stream of the stand-in: given to it, and done later.

Memory of the stand-in is the host's, so torch would work on it at once. Where this mode is on, what writes into a
tensor is queued; views are made at once, as on a GPU, and so is new memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Give(Protocol):
    def __call__(self, work: Callable[[], object], *, reads: list[Tensor], writes: list[Tensor]) -> None: ...


class OnStream(TorchDispatchMode):
    """Where it is entered, torch works on a stream.

    Args:
        give: Gives the stream something to do.
        allocate: [size] of a dtype on the device.
    """

    def __init__(self, give: Give, allocate: Callable[[int, torch.dtype], Tensor]):
        super().__init__()
        self._give = give
        self._allocate = allocate

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.empty.memory_format:
            (size,) = args[0]
            return self._allocate(size, kwargs["dtype"])
        arguments = func._schema.arguments
        values = [*args, *(kwargs.get(argument.name) for argument in arguments[len(args) :])]
        tensors = [
            (value, argument.alias_info is not None and argument.alias_info.is_write)
            for argument, value in zip(arguments, values, strict=True)
            if isinstance(value, Tensor)
        ]
        written = [tensor for tensor, is_written in tensors if is_written]
        if not written:
            return func(*args, **kwargs)
        read = [tensor for tensor, is_written in tensors if not is_written]
        self._give(lambda: func(*args, **kwargs), reads=read, writes=written)
        return written[0]
