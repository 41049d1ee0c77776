"""The copy of the state that a save in the background writes."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpipar.checkpoint import snapshot
from mpipar.checkpoint.snapshot import Snapshot


@given(st.lists(st.integers(0, 300), max_size=8), st.integers(1, 5))
def test_is_what_was_there_however_many_threads_copy(sizes: list[int], threads: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot, "_PIECE_BYTES", 64)
        sources = [torch.randint(256, (size,), dtype=torch.uint8) for size in sizes]
        expected = [source.clone() for source in sources]
        before = threading.active_count()
        copies = Snapshot(threads).take(sources)
        assert threading.active_count() == before
        for source in sources:
            source.zero_()  # the run goes on
        assert all(torch.equal(copy, original) for copy, original in zip(copies, expected, strict=True))


def test_is_taken_again_in_the_same_memory() -> None:
    taker = Snapshot(2)
    first = taker.take([torch.ones(9, dtype=torch.uint8), torch.ones(7, dtype=torch.uint8)])
    again = taker.take([torch.zeros(9, dtype=torch.uint8), torch.zeros(7, dtype=torch.uint8)])
    assert [copy.data_ptr() for copy in again] == [copy.data_ptr() for copy in first]
    (larger,) = taker.take([torch.full((17,), 3, dtype=torch.uint8)])
    assert larger.tolist() == [3] * 17
