"""Who makes which shard, by claims that are files; and what another try finds."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from mpipar.data.plan import ShardPlan, deal
from mpipar.data.workshop import Workshop
from mpipar.errors import DataError

PLANS = [ShardPlan("train", index, 12, (index,), 1, 100 + index, 200) for index in range(12)]


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    shop = Workshop(tmp_path / ".partial-01234567-out")
    shop.clean()
    return shop


def test_each_begins_with_its_own_and_goes_on_with_those_of_others(shop: Workshop) -> None:
    left = [index for index in range(12) if index != 4]  # one is finished
    dealt = deal([PLANS[index].text_bytes + PLANS[index].read_bytes for index in left], 3)
    alone = list(shop.claim(PLANS, left, rank=1, num_ranks=3))
    assert alone[: len(dealt[1])] == [left[item] for item in dealt[1]]
    assert sorted(alone) == left
    assert not list(shop.claim(PLANS, left, rank=0, num_ranks=3)), "nothing is left"


def test_nothing_is_made_twice(shop: Workshop) -> None:
    """Ranks side by side, each with an object of its own."""
    made: list[int] = []
    start = threading.Barrier(4)

    def work(rank: int) -> None:
        start.wait()
        made.extend(Workshop(shop.folder).claim(PLANS, range(12), rank, 4))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == list(range(12))


def test_when_one_has_failed_nobody_begins_another(shop: Workshop) -> None:
    claims = shop.claim(PLANS, range(12), rank=0, num_ranks=2)
    next(claims)
    Workshop(shop.folder).stop()
    assert not list(claims) and not list(shop.claim(PLANS, range(12), rank=1, num_ranks=2))


def test_a_disk_that_refuses_claims_is_named(shop: Workshop) -> None:
    (shop.work / "claims").rmdir()
    with pytest.raises(DataError, match=r"cannot write .*claims/train-\d+\.h5: No such file"):
        next(shop.claim(PLANS, range(12), rank=0, num_ranks=1))


def test_the_next_try_keeps_what_is_whole(shop: Workshop) -> None:
    list(shop.claim(PLANS, range(12), rank=0, num_ranks=1))
    shop.stop()
    whole = [shop.folder / "train-00000.h5", shop.folder / "tokenizer.json", shop.survey]
    unfinished = [shop.folder / ".partial-89abcdef-train-00001.h5", shop.work / "skipped-1"]
    for path in (*whole, *unfinished):
        path.write_text("")
    shop.clean()
    assert all(path.exists() for path in whole) and not any(path.exists() for path in unfinished)
    assert sorted(shop.claim(PLANS, range(12), rank=0, num_ranks=1)) == list(range(12)), "all claims are new"
