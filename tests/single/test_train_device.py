"""Which GPU each rank takes, over hosts that are made up."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpipar.errors import ConfigError
from mpipar.train.config import TrainConfig
from mpipar.train.device import Gpu, Placement, Seen, place
from mpipar.train.resolve import precision_on

BLIND = Seen("n9", (), "no driver")


def host(number: int, num_gpus: int, name: str = "NVIDIA H200", capability: tuple[int, int] = (9, 0)) -> Seen:
    """A host of which a rank sees all GPUs."""
    gpus = tuple(Gpu(f"{number}-{index}", name, capability) for index in range(num_gpus))
    return Seen(f"n{number}", gpus)


def test_gpus_without_cupy_are_left_alone_and_it_is_said() -> None:
    seen = [Seen("n1", (), "CuPy is missing", unusable=True)] * 2
    assert "cannot use its GPUs: CuPy is missing, nor do 1 more" in place("auto", seen, [0, 0]).note
    with pytest.raises(ConfigError, match="rank 0 on host n1 cannot use its GPUs: CuPy is missing"):
        place("cuda", seen, [0, 0])


def only(seen: Seen, *indices: int) -> Seen:
    """As CUDA_VISIBLE_DEVICES makes it."""
    return replace(seen, gpus=tuple(seen.gpus[i] for i in indices))


def test_one_rank_a_gpu_by_local_rank() -> None:
    seen, hosts = [host(0, 4)] * 4 + [host(1, 4)] * 4, [0] * 4 + [4] * 4
    placement = place("auto", seen, hosts)
    assert placement.indices == (0, 1, 2, 3, 0, 1, 2, 3)
    assert placement.device(6) == torch.device("cuda", 2)
    assert placement.said() == "8 x NVIDIA H200, one for each rank"
    assert len(placement.gpus_of(range(8))) == 8 and len(placement.gpus_of([1, 5, 6])) == 3


def test_ranks_of_a_host_need_not_follow_each_other() -> None:
    seen = [host(0, 2), host(1, 2)] * 2
    assert place("cuda", seen, [0, 1, 0, 1]).indices == (0, 0, 1, 1)


def test_slurm_shows_each_task_its_own() -> None:
    seen = [only(host(0, 4), i) for i in range(4)]
    placement = place("auto", seen, [0] * 4)
    assert placement.indices == (0, 0, 0, 0), "of the one that it sees"
    assert "one for each rank" in placement.said()


def test_masks_that_overlap() -> None:
    seen = [only(host(0, 3), 0, 1), only(host(0, 3), 1, 0), only(host(0, 3), 0, 2)]
    placement = place("auto", seen, [0] * 3)
    assert [gpu.uuid for gpu in placement.gpus] == ["0-0", "0-1", "0-2"]


def test_several_ranks_a_gpu_are_said_aloud() -> None:
    placement = place("cuda", [host(0, 1)] * 2, [0, 0])
    assert placement.indices == (0, 0) and len(placement.gpus_of([0, 1])) == 1
    assert placement.said() == "1 x NVIDIA H200, SHARED by 2 ranks each, which take turns"
    assert "SHARED by 1 to 2 ranks" in place("cuda", [host(0, 2)] * 3, [0] * 3).said()


@given(num_ranks=st.integers(1, 40), num_gpus=st.integers(1, 9), num_hosts=st.integers(1, 4))
def test_gpus_are_shared_evenly(num_ranks: int, num_gpus: int, num_hosts: int) -> None:
    hosts = [rank % num_hosts for rank in range(num_ranks)]
    placement = place("auto", [host(number, num_gpus) for number in hosts], hosts)
    loads = Counter(gpu.uuid for gpu in placement.gpus)
    for number in set(hosts):
        here = [loads[f"{number}-{index}"] for index in range(num_gpus)]
        assert max(here) - min(here) <= 1 and sum(here) == hosts.count(number)


def test_auto_wants_them_everywhere() -> None:
    assert place("auto", [BLIND] * 3, [0] * 3) == Placement()
    partly = place("auto", [host(0, 2), BLIND, BLIND], [0, 1, 1])
    assert not partly.on_gpus and partly.device(0) == torch.device("cpu")
    assert partly.note == "GPUs are left alone: rank 1 on host n9 sees no CUDA device: no driver, nor do 1 more"
    assert place("cpu", [host(0, 2)], [0]) == Placement()


def test_asked_for_and_not_there() -> None:
    with pytest.raises(ConfigError, match=r"--train\.device cuda: rank 1 on host n9 sees no CUDA device: no driver"):
        place("cuda", [host(0, 2), BLIND], [0, 1])


def test_what_this_process_sees() -> None:
    seen = Seen.here()
    assert bool(seen.gpus) == torch.cuda.is_available() and bool(seen.gpus) != bool(seen.why_none)


@pytest.mark.parametrize(
    ("gpus", "asked", "taken"),
    [
        (host(0, 1), "auto", "bf16"),
        (host(0, 1, "Tesla T4", (7, 5)), "auto", "fp16"),
        (host(0, 1), "tf32", "tf32"),
        (host(0, 1, "Tesla T4", (7, 5)), "bf16", "Tesla T4 does not have it"),
        (host(0, 1, "Tesla T4", (7, 5)), "fp32", "fp32"),
        (None, "fp16", "is for GPUs, and this run is on the CPU: take bf16 or fp32"),
        (None, "tf32", "is for GPUs"),
        (None, "bf16", "bf16"),
    ],
)
def test_precision(gpus: Seen | None, asked: str, taken: str) -> None:
    placement = place("auto", [gpus], [0]) if gpus else Placement()
    train = TrainConfig(precision=asked)  # type: ignore[arg-type]
    if " " in taken:
        with pytest.raises(ConfigError, match=taken):
            precision_on(placement, train)
    else:
        assert precision_on(placement, train) == taken
