"""Amounts as people read them."""

from __future__ import annotations

import pytest

from mpipar.amounts import plural, size


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (20_480, "20.5 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (31_500_000, "31.5 MB"),
        (1_500_000_000, "1.5 GB"),
        (4e15, "4,000.0 TB"),
    ],
)
def test_sizes(num_bytes: float, text: str) -> None:
    assert size(num_bytes) == text


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(1, "rank", "1 rank"), (0, "rank", "0 ranks"), (2000, "microbatch", "2,000 microbatches")],
)
def test_plurals(number: int, noun: str, text: str) -> None:
    assert plural(number, noun) == text
