"""Who packs what."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mpipar.data.plan import deal, plan_shards

SIZES = st.lists(st.integers(0, 10**6), max_size=60)


@given(sizes=SIZES, num_ranks=st.integers(1, 20))
def test_deal_gives_every_item_once_and_evenly(sizes: list[int], num_ranks: int) -> None:
    dealt = deal(sizes, num_ranks)
    assert sorted(item for mine in dealt for item in mine) == list(range(len(sizes)))
    loads = [sum(sizes[item] for item in mine) for mine in dealt]
    # Graham 1969: largest first is within 4/3 - 1/(3n) of the best, which is at least the mean and the largest item.
    best = max([sum(sizes) / num_ranks, *sizes])
    if len(sizes) > num_ranks:
        best = max(best, sum(sorted(sizes)[-num_ranks - 1 :][:2]))
    assert max(loads) <= 4 / 3 * best + 1e-6


@given(sizes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**5)), min_size=1, max_size=80))
def test_shards_hold_every_document_once(sizes: list[tuple[int, int]]) -> None:
    text_bytes = np.array(sizes, np.int64)
    num_documents = (text_bytes + 999) // 1000
    plans = plan_shards(num_documents, text_bytes)
    for column, split in enumerate(("train", "val")):
        own = [plan for plan in plans if plan.split == split]
        assert [plan.index for plan in own] == list(range(len(own)))
        assert {plan.num_shards for plan in own} <= {len(own)}
        pieces = [piece for plan in own for piece in plan.pieces]
        assert pieces == np.flatnonzero(num_documents[:, column]).tolist()
        assert all(plan.text_bytes == text_bytes[list(plan.pieces), column].sum() for plan in own)
        assert all(plan.read_bytes == text_bytes[list(plan.pieces)].sum() for plan in own)
        assert all(plan.num_documents == num_documents[list(plan.pieces), column].sum() > 0 for plan in own)


def test_shards_are_of_like_size() -> None:
    text_bytes = np.stack([np.full(1600, 20_000), np.full(1600, 1_000)], axis=1)
    plans = plan_shards(np.ones_like(text_bytes), text_bytes)
    assert [plan.split for plan in plans] == ["train"] * 16 + ["val"] * 2, "to find what is for validation, all is read"
    assert [plan.read_bytes // 1_000_000 for plan in plans[-2:]] == [16, 16]
    sizes = [plan.text_bytes for plan in plans[:15]]
    assert max(sizes) - min(sizes) <= 20_000


def test_a_huge_corpus_has_shards_of_128_mib() -> None:
    text_bytes = np.stack([np.full(20_000, 1 << 20), np.zeros(20_000, np.int64)], axis=1)
    plans = plan_shards(np.minimum(text_bytes, 1), text_bytes)
    assert {plan.text_bytes for plan in plans[:-1]} == {128 << 20}
