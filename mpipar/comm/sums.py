"""Sums and copies over views of memory, planned once and run often.

A plan is a list of calls without arguments: in a training step the same memory is summed over and over, and to cut the
views again each time would take longer than to add up a few thousand elements.

Where adding.c was compiled it adds up what it can, in one pass; else numpy or torch do, a cache-sized run at a time, to
the same bits. Sums of 16-bit floats are kept in 32 bits until they are whole.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from mpipar.comm.adding import Place, plan_addition
from mpipar.comm.buffers import Buffer, Op
from mpipar.comm.p2p import segments

Step = Callable[[], object]

# Of all sources together: what is added up is still in a core's second-level cache when the sum is written back.
_RUN_BYTES = 512 << 10
_LEAST_RUN_BYTES = 64 << 10  # of one source: shorter runs cost more Python than cache

# Of the calls that run in it numpy does not warn: an infinite sum is for whoever asked for it to judge.
_QUIET = contextvars.Context()
_QUIET.run(np.seterr, over="ignore", invalid="ignore")


def run(steps: Iterable[Step]) -> None:
    """Does what was planned."""
    for step in steps:
        step()


def plan_copy(target: Any, source: Any) -> Step:
    """target[:] = source, both of one library."""
    return partial(target.copy_ if isinstance(target, torch.Tensor) else partial(np.copyto, target), source)


def plan_sum(
    out: Place,
    sources: Sequence[Place],
    size: int,
    op: Op,
    count: int,
    into: Sequence[Buffer] = (),
) -> list[Step]:
    """`out` becomes the sum (mean, maximum) of the sources, in their order.

    Args:
        out: Buffer and first element. It may be the first source.
        sources: Buffers and their first elements, of the dtype of `out`.
        size: Elements.
        op: The operation.
        count: What a mean divides by.
        into: Buffers that get the result as well, at the place of `out`.
    """
    like, at = out
    if op == "sum":
        addition = plan_addition([out, *((buffer, at) for buffer in into)], sources, size)
        if addition is not None:
            return [addition]
    elements = max(_RUN_BYTES // len(sources), _LEAST_RUN_BYTES) // like.itemsize
    is_wide = like.lib is torch and op != "max"
    wide = torch.empty(min(size, elements), dtype=torch.float32, device="cpu") if is_wide else None
    steps: list[Step] = []
    for a, b in segments(0, size, elements):
        total = like.values[at + a : at + b]
        runs = [source.values[start + a : start + b] for source, start in sources]
        steps += _plan_run(total, runs, op, count, wide)
        steps += [plan_copy(other.values[at + a : at + b], total) for other in into]
    return steps


def plan_sum_into(targets: Sequence[Buffer], sources: Sequence[Buffer], start: int, stop: int) -> list[Step]:
    """Elements [start, stop) of all targets become the sum of the sources' there, converted to the targets' dtype.

    Args:
        targets: Of one dtype.
        sources: Of one dtype, one that numpy adds; they stay as they are.
        start: First element.
        stop: Behind the last element.
    """
    addition = plan_addition([(x, start) for x in targets], [(x, start) for x in sources], stop - start)
    if addition is not None:
        return [addition]
    like = sources[0]
    elements = max(_RUN_BYTES // len(sources), _LEAST_RUN_BYTES) // like.itemsize
    sum_of_run = np.empty(min(stop - start, elements), like.values.dtype)
    steps: list[Step] = []
    for a, b in segments(start, stop, elements):
        total = sum_of_run[: b - a]
        steps += _plan_run(total, [source.values[a:b] for source in sources], "sum", 1, None)
        first, *others = (target.values[a:b] for target in targets)
        steps.append(_plan_conversion(first, total))
        steps += [plan_copy(other, first) for other in others]
    return steps


def _plan_conversion(target: Any, source: Any) -> Step:
    """target[:] = source, of another dtype, and perhaps of another library."""
    if isinstance(target, torch.Tensor):
        return partial(target.copy_, torch.from_numpy(source))
    return partial(_QUIET.run, np.copyto, target, source, "same_kind")


def _plan_run(out: Any, sources: Sequence[Any], op: Op, count: int, wide: torch.Tensor | None) -> list[Step]:
    total = out if wide is None else wide[: len(out)]
    first, *others = sources
    steps: list[Step] = []
    if wide is not None or (not others and first is not out):
        steps.append(plan_copy(total, first))
        first = total
    for other in others:
        steps.append(_plan_add(total, first, other, op))
        first = total
    if op == "mean":
        steps.append(partial(_scale, total, 1 / count))
    if total is not out:
        steps.append(plan_copy(out, total))
    return steps


def _plan_add(out: Any, x: Any, y: Any, op: Op) -> Step:
    if isinstance(out, torch.Tensor):
        return partial(torch.maximum if op == "max" else torch.add, x, y, out=out)
    return partial(_QUIET.run, np.maximum if op == "max" else np.add, x, y, out=out)


def _scale(values: Any, factor: float) -> None:
    values *= factor
