"""What can hold a sum of gradients: each does what the comparison says of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.exact import error
from benchmarks.gradients import History
from benchmarks.representations import BLOCK, Sum, has_compiled, representations
from mpipar.comm.exact import carry_bits

EXACT = {name: how for name, how in representations().items() if not how.rounds}
SIZES = {"small": 5, "blocks": 2 * BLOCK, "uneven": 20 * BLOCK + 7}


def gradients(seed: int, count: int) -> list[dict[str, Tensor]]:
    """Below 1, over twenty powers of two."""
    rng = np.random.default_rng(seed)
    return [
        {
            name: torch.from_numpy((rng.uniform(-1, 1, n) * 2.0 ** rng.integers(-20, 1, n)).astype(np.float32))
            for name, n in SIZES.items()
        }
        for _ in range(count)
    ]


def add_up(name: str, contributions: list[dict[str, Tensor]], *, compiled: bool) -> Sum:
    how, bits = EXACT[name], carry_bits(len(contributions))
    tops = {key: [0] * (-(-size // BLOCK) if how.blocks else 1) for key, size in SIZES.items()}
    total = Sum(how, SIZES, tops, bits, compiled=compiled)
    for contribution in contributions:
        for key, x in contribution.items():
            total.add(key, x)
    return total


@pytest.mark.parametrize("name", EXACT)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 5))
def test_no_order_shows_and_each_contribution_rounds_once(name: str, seed: int, count: int) -> None:
    contributions = gradients(seed, count)
    total = add_up(name, contributions, compiled=False)
    assert torch.equal(add_up(name, contributions[::-1], compiled=False).totals, total.totals)
    if has_compiled(EXACT[name]):
        assert torch.equal(add_up(name, contributions, compiled=True).totals, total.totals)
    unrounded = sum(torch.cat([x.double() for x in contribution.values()]) for contribution in contributions)
    bound = count * EXACT[name].spacing(0, carry_bits(count)) / 2
    assert (total.values() - unrounded).abs().max() <= bound + 2**-50


def test_grids_of_blocks_follow_their_own_values() -> None:
    histories = {name: History(how, {"a": 2 * BLOCK}) for name, how in EXACT.items()}
    for history in histories.values():
        history.move_on({"a": [0.75, 2.0**-9]})
    assert histories["blocks"].tops == {"a": [0, -8]} and histories["int32"].tops == {"a": [0]}
    overflowed = {name: history.overflowed({"a": [1.0, 2.0**-5]}) for name, history in histories.items()}
    assert overflowed == {"float64": False, "int64": False, "int32": False, "blocks": True}
    for history in histories.values():
        history.move_on({"a": [0.125, 0.5]})
    assert histories["blocks"].tops == {"a": [-1, 0]} and histories["int32"].tops == {"a": [0]}


def test_errors_are_relative_to_what_was_expected() -> None:
    found = error(torch.tensor([3.0, 4.5, 0.0]).double(), torch.tensor([3.0, 4.0, 0.0]).double(), {"a": 2, "b": 1})
    assert found.l2 == 0.1 and found.worst == 0.1 and 0.12 < found.percentile <= 0.125
