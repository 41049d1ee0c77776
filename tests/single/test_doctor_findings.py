"""The doctor's judgement of machines that are made up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mpipar.comm.environment import GpuTransfer, MpiFacts
from mpipar.doctor.facts import FolderFacts, RankFacts, folder_facts
from mpipar.doctor.findings import GIB, MIB, Finding, judge, judge_devices, some
from mpipar.train.device import Gpu, Seen

MPI = MpiFacts("Open MPI v5.0.11", (3, 1), "serialized", 2**31 - 1, "off")
RANK = RankFacts(
    host="n1",
    cores=frozenset(range(8)),
    threads=1,
    cores_per_rank=1,
    software={"mpipar": "0.1.0", "torch": "2.13.0"},
    mpi=MPI,
    fast_bf16=True,
    compiled_library=True,
    compiled_sums=True,
    shm_bytes=(30 * GIB, 32 * GIB),
    sees_folder=True,
    devices=Seen("n1", (), "no driver"),
)
H200 = Gpu("0", "NVIDIA H200", (9, 0))
FOLDER = FolderFacts("/scratch/me", "lustre", 900 * GIB, "", "", "2.0.0")
NO_GPU = GpuTransfer("untried", "no CUDA device")


def cluster(hosts: int, ranks_per_host: int) -> list[RankFacts]:
    return [replace(RANK, host=f"n{host}") for host in range(hosts) for _ in range(ranks_per_host)]


def worse_than_ok(
    ranks: list[RankFacts], folder: FolderFacts = FOLDER, gpu: GpuTransfer = NO_GPU
) -> list[tuple[str, str]]:
    return [(finding.mark, str(finding)) for finding in judge(ranks, folder, gpu) if finding.mark != "ok"]


def test_nothing_to_say_against_a_good_cluster() -> None:
    assert worse_than_ok(cluster(hosts=128, ranks_per_host=8)) == []


@pytest.mark.parametrize(
    ("change", "mark", "said"),
    [
        (
            {"software": {"mpipar": "0.1.0", "torch": "2.4.0"}},
            "bad",
            "torch is 2.13.0 on rank 0, 2.4.0 on rank 3 (host n1)",
        ),
        ({"mpi": replace(MPI, library="MPICH 5.0.2")}, "bad", "MPICH 5.0.2, Open MPI v5.0.11"),
        ({"sees_folder": False}, "bad", "/scratch/me (lustre) is another folder on n1"),
        ({"fast_bf16": False}, "note", "no bf16 instructions on n1"),
    ],
)
def test_one_rank_that_differs_is_named(change: dict[str, object], mark: str, said: str) -> None:
    ranks = cluster(hosts=2, ranks_per_host=2)
    ranks[3] = replace(ranks[3], **change)  # type: ignore[arg-type]
    [(found, text)] = worse_than_ok(ranks)
    assert found == mark and said in text


@pytest.mark.parametrize(
    ("change", "mark", "said"),
    [
        ({"thread_level": "funneled"}, "bad", "main thread only"),
        ({"fault_tolerance": "absent"}, "note", "no fault tolerance"),
    ],
)
def test_what_an_mpi_lacks(change: dict[str, object], mark: str, said: str) -> None:
    [(found, text)] = worse_than_ok([replace(RANK, mpi=replace(MPI, **change))])  # type: ignore[arg-type]
    assert found == mark and said in text


def test_more_ranks_than_cores() -> None:
    [(mark, text)] = worse_than_ok([replace(RANK, cores=frozenset({0, 1}), threads=2)] * 8)
    assert mark == "note" and "8 ranks on 2 cores" in text and "mpirun -n 2" in text


def test_ranks_bound_to_cores_of_their_own_do_not_share_them() -> None:
    bound = [replace(RANK, cores=frozenset({core}), threads=1) for core in range(8)]
    assert worse_than_ok(bound) == []


def test_more_threads_than_cores() -> None:
    [(mark, text), (idle, advice)] = worse_than_ok([replace(RANK, threads=8, cores_per_rank=2)] * 4)
    assert mark == "note" and "8 threads a rank is too many" in text and "OMP_NUM_THREADS=2" in text
    assert idle == "note" and "there are 2 cores a rank" in advice and "--train.threads 2" in advice


def test_without_a_compiler_sums_are_slower() -> None:
    [(mark, text)] = worse_than_ok([RANK, replace(RANK, host="n2", compiled_library=False)])
    assert mark == "note" and "rounded by torch on n2" in text and "C compiler" in text


def test_without_headers_of_python_sums_on_a_host_take_longer() -> None:
    [(mark, text)] = worse_than_ok([RANK, replace(RANK, host="n2", compiled_sums=False)])
    assert mark == "note" and "step by step" in text and "on n2" in text and "python3-dev" in text


@pytest.mark.parametrize(
    ("gpu", "mark"),
    [
        (NO_GPU, "ok"),
        (GpuTransfer("untried", "CuPy is missing"), "note"),
        (GpuTransfer("fails", "NVIDIA H200, Segmentation fault"), "note"),
        (GpuTransfer("works", "NVIDIA H200, 4 MiB in 0.1 ms"), "ok"),
    ],
)
def test_gpu(gpu: GpuTransfer, mark: str) -> None:
    [finding] = [finding for finding in judge([RANK], FOLDER, gpu) if "GPU" in finding.text]
    assert finding.mark == mark and gpu.detail in finding.text


@pytest.mark.parametrize(
    ("change", "mark", "said"),
    [
        ({"write_error": "Permission denied"}, "bad", "nothing can be written: Permission denied"),
        ({"lock_error": "No locks available"}, "note", "HDF5_USE_FILE_LOCKING=FALSE"),
        ({"free_bytes": 100 * MIB}, "note", "0.1 GiB free"),
    ],
)
def test_folder(change: dict[str, object], mark: str, said: str) -> None:
    [(found, text)] = worse_than_ok([RANK], replace(FOLDER, **change))  # type: ignore[arg-type]
    assert found == mark and said in text


@pytest.mark.parametrize("shm_bytes", [None, (60 * MIB, 64 * MIB)])
def test_little_shared_memory(shm_bytes: tuple[int, int] | None) -> None:
    [(mark, text)] = worse_than_ok([replace(RANK, shm_bytes=shm_bytes)] * 2)
    assert mark == "note" and "/dev/shm" in text


def test_shared_memory_that_is_enough_for_one_rank() -> None:
    assert worse_than_ok([replace(RANK, shm_bytes=(60 * MIB, 64 * MIB))]) == []


def test_a_finding_is_a_line_and_what_to_do() -> None:
    assert str(Finding("ok", "all is well")) == "[ok]   all is well"
    assert str(Finding("bad", "it is not", "do this")) == "[bad]  it is not\n       -> do this"


def test_long_lists_are_cut() -> None:
    assert some(["a", "b"]) == "a, b"
    assert some([str(i) for i in range(1000)]) == "0, 1, 2, 3 and 996 more"


def test_a_real_folder(tmp_path: Path) -> None:
    facts = folder_facts(tmp_path)
    assert facts.write_error == "" and facts.free_bytes > 0 and facts.file_system != "unknown"
    assert list(tmp_path.iterdir()) == [], "it leaves nothing behind"


def test_a_folder_in_which_nothing_can_be_written() -> None:
    assert folder_facts(Path("/proc")).write_error != ""


def test_gpus() -> None:
    seeing = replace(RANK, devices=Seen("n1", (H200, replace(H200, uuid="1"))))
    assert list(judge_devices([RANK] * 2)) == []
    assert [str(finding) for finding in judge_devices([seeing] * 2)] == [
        "[ok]   --train.device auto takes 2 x NVIDIA H200, one for each rank"
    ]
    (crowded,) = judge_devices([seeing] * 5)
    assert crowded.mark == "note" and "SHARED by 2 to 3 ranks" in crowded.text and "mpirun -n 2" in crowded.remedy
    (partly,) = judge_devices([seeing, replace(RANK, host="n2", devices=Seen("n2", (), "no driver"))])
    assert partly.mark == "note" and "rank 1 on host n2 sees no CUDA device: no driver" in partly.text
