"""Bad input and failing ranks: one clear message, a non-zero exit, nobody left waiting, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mpipar import checkpoint
from tests.jobs.launch import ROOT, Job, Outcome, run
from tests.jobs.results import metrics

pytestmark = pytest.mark.timeout(240)

Arguments = Callable[..., list[str]]
FAILING = str(ROOT / "tests" / "jobs" / "failing.py")
ABSENT = str(ROOT / "tests" / "jobs" / "absent.py")


def faulty(train: Arguments, num_ranks: int, fault: str, rank: int, step: int, *more: object) -> Outcome:
    """A run of four microbatches a step with a fault; `step` counts the microbatches of the rank."""
    return run(num_ranks, FAILING, fault, str(rank), str(step), *train("--train.steps", 8, *more)[2:])


@pytest.fixture
def damaged(data: Path, tmp_path: Path) -> Path:
    """A copy of the data set, to be damaged."""
    copy = tmp_path / "damaged"
    shutil.copytree(data, copy)
    return copy


def test_no_shards(train: Arguments, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    run(2, *train("--data.dir", nowhere)).refused(str(nowhere), "python -m mpipar.data pack")
    assert not (tmp_path / "run").exists(), "nothing is made for a run that cannot be"


def test_a_truncated_shard(train: Arguments, damaged: Path) -> None:
    shard = damaged / "train-00000.h5"
    os.truncate(shard, shard.stat().st_size - 100)
    run(2, *train("--data.dir", damaged)).refused("train-00000.h5")


def test_a_flipped_bit_in_a_shard_is_found_when_it_is_read(train: Arguments, damaged: Path) -> None:
    """Ranks read it in the middle of a step, each for itself; still one message comes."""
    shard = damaged / "train-00000.h5"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    run(4, *train("--data.dir", damaged, "--train.steps", 200)).refused("train-00000.h5", "checksum")


def test_a_flipped_bit_in_the_validation_split(train: Arguments, damaged: Path) -> None:
    shard = damaged / "val-00000.h5"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    run(2, *train("--data.dir", damaged, "--train.steps", 2)).refused("val-00000.h5", "checksum")


def test_another_tokenizer(train: Arguments, damaged: Path) -> None:
    path = damaged / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    path.write_text(json.dumps(tokenizer))
    run(2, *train("--data.dir", damaged)).refused("tokenizer")


def test_settings_that_do_not_exist(train: Arguments, tmp_path: Path) -> None:
    flag = run(2, *train("--train.stepz", 5))
    assert flag.code == 2 and flag.text.count("unrecognized options") == 1, "from one rank"
    assert "--train.steps" in flag.text and "Traceback" not in flag.text
    config = tmp_path / "c.toml"
    config.write_text("[train]\nstepz = 5\n")
    run(2, *train("--config", config)).refused("'train.stepz' does not exist", "'steps'")


def test_sizes_that_do_not_divide(train: Arguments) -> None:
    for flags, reason in [
        (("--train.global-batch", 5, "--train.microbatch", 2), "not a multiple of --train.microbatch 2"),
        (("--model.dim", 30, "--model.heads", 4), "--model.dim 30"),
    ]:
        outcome = run(2, *train(*flags))
        assert outcome.code != 0 and "Traceback" not in outcome.text
        said = " ".join(outcome.text.replace("│", " ").split())
        assert said.count(reason) == 1, outcome.text


def test_a_checkpoint_of_another_model(train: Arguments, tmp_path: Path) -> None:
    run(2, *train("--train.steps", 2)).ok()
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    run(2, *train("--train.steps", 4, "--model.dim", 64)).refused("--model.dim was 32 and is 64")
    run(2, *train("--train.steps", 4, "--train.seed", 9)).refused("--train.seed was 1 and is 9")
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before


def test_a_damaged_checkpoint(train: Arguments, tmp_path: Path) -> None:
    run(2, *train("--train.steps", 4, "--checkpoint.every", 2)).ok()
    state = tmp_path / "run" / "checkpoints" / "step-00000004" / "state-0.h5"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    run(2, *train("--train.steps", 6)).refused("step-00000004", "go on from step 2")


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_resume_from_what_is_no_checkpoint(train: Arguments, tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    run(2, *train("--resume", tmp_path / folder)).refused(str(tmp_path / folder))


def test_a_rank_that_raises_ends_the_job(train: Arguments) -> None:
    """In the middle of a step, when the others already wait for its gradients. Its bug keeps its traceback."""
    outcome = faulty(train, 4, "raise", 2, 3)
    assert outcome.code != 0
    assert outcome.text.count("ZeroDivisionError: the rank's own bug") == 1
    assert sum(line.lstrip().startswith("mpipar:") for line in outcome.lines) == 1
    assert "mpipar: rank 2: failed" in outcome.text


def test_a_rank_whose_gpu_is_full_ends_the_job_and_says_what_to_shrink(train: Arguments) -> None:
    outcome = faulty(train, 4, "memory", 2, 3)
    outcome.refused(
        "has no memory left: Tried to allocate 2.00 GiB.", "--train.activation-checkpointing true", "rank 2"
    )


def test_gpus_that_are_not_there_are_missed(train: Arguments) -> None:
    if torch.cuda.is_available():
        pytest.skip("they are there")
    run(2, *train("--train.device", "cuda")).refused("--train.device cuda: rank 0 on host", "no CUDA device", "cpu")
    run(1, *train("--train.precision", "fp16", "--train.device", "cpu")).refused("--train.precision fp16 is for GPUs")


def test_a_rank_that_hangs_is_named(train: Arguments) -> None:
    outcome = faulty(train, 4, "hang", 1, 3, "--comm.timeout-s", 2)
    outcome.refused("all_reduce", "on axis 'dp': nothing moved", "Rank 1 did not arrive", "Ranks 0, 2, 3 waited")


@pytest.mark.parametrize("call", ["split", "duplicate", "leave"])
def test_a_rank_that_does_not_come_to_a_call_of_mpi_is_named(call: str) -> None:
    run(3, ABSENT, call).refused("barrier", "on axis 'world': nothing moved for 2 s", "Rank 1 did not arrive")


def test_a_rank_that_does_not_begin_ends_the_job() -> None:
    outcome = run(2, ABSENT, "begin")
    outcome.refused("rank 0 waited 2 s in MPI_Comm_dup, to begin", "--comm.timeout-s")


def test_a_rank_that_does_not_finalize_ends_the_job() -> None:
    """No Python runs in MPI_Finalize, so it is the traceback that says where the others waited."""
    outcome = run(2, ABSENT, "finalize")
    assert outcome.code != 0
    assert "Timeout (0:00:02)!" in outcome.text and "in _end" in outcome.text


def test_a_step_that_is_not_finite_is_skipped_by_all(train: Arguments, tmp_path: Path) -> None:
    outcome = faulty(train, 2, "nan", 1, 5).ok()  # the rank's fifth microbatch: the third step
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if line.get("skipped")] == [3]
    assert next(line for line in lines if line["step"] == 3)["loss"] is None
    assert outcome.text.count("skipped") == 1 and outcome.lines[-1].startswith("done: 8 steps")


def test_a_run_that_stays_not_finite_ends(train: Arguments, tmp_path: Path) -> None:
    faulty(train, 2, "nans", 0, 3, "--train.max-skipped", 4).refused("4 steps in a row", "--train.lr")
    assert not checkpoint.latest(tmp_path / "run" / "checkpoints")


def test_a_full_disk(train: Arguments, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the checkpoint does not fit, the last good one stays."""
    run(1, *train("--train.steps", 2)).ok()
    limit = 100_000  # bytes: metrics fit, a checkpoint does not
    program = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
    program += "import runpy; runpy.run_module('mpipar.train', run_name='__main__')"
    arguments = train("--train.steps", 4)[2:]
    outcome = run(2, "-c", program, *arguments)
    outcome.refused("step-00000004 cannot be written", "Earlier checkpoints are as they were")
    latest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert latest is not None and latest.name == "step-00000002"
    checkpoint.load(latest).close()
    assert not list((tmp_path / "run").rglob(".partial-*"))
    run(1, *train("--train.steps", 4)).ok()


def test_a_disk_that_fills_up_does_not_end_the_run(train: Arguments, tmp_path: Path) -> None:
    """The system takes nothing of rank 1's first two checkpoints: that is told, and the third is another try."""
    outcome = faulty(train, 2, "full", 1, 2, "--train.steps", 9, "--checkpoint.every", 2).ok()
    said = [line for line in outcome.lines if line.startswith("save ")]
    assert len(said) == 2 and outcome.lines[-1].startswith("done: 9 steps"), outcome.text
    for line, step in zip(said, (2, 4), strict=True):
        assert f"step-0000000{step} cannot be written: File too large" in line and "(rank 1)" in line
        assert "training goes on" in line
    assert not list((tmp_path / "run").rglob(".partial-*"))
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        with checkpoint.load(path) as found:
            found.verify()
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000008", "step-00000009"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 64 KiB; `resize` makes it larger."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield small
    subprocess.run(["umount", str(small)], check=True)


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def test_a_disk_that_is_full_from_the_start(train: Arguments, small_disk: Path) -> None:
    """Not even metrics fit."""
    with (small_disk / "filler").open("wb") as filler:
        filler.write(bytes(56 * 1024))
    run(2, *train("--train.steps", 40, "--run.dir", small_disk / "run")).refused("No space left")


def test_a_disk_with_room_for_one_checkpoint(train: Arguments, small_disk: Path) -> None:
    """The first stays while the later ones do not fit; the last one has to, and when there is room the run goes on."""
    resize(small_disk, "600k")
    settings = ["--train.steps", 6, "--checkpoint.every", 2, "--run.dir", small_disk / "run"]
    outcome = run(2, *train(*settings))
    outcome.refused("step-00000006 cannot be written: No space left", "Earlier checkpoints are as they were")
    said = [line for line in outcome.lines if line.startswith("save ")]
    assert len(said) == 1 and "step-00000004 cannot be written: No space left" in said[0], outcome.text
    assert "training goes on" in said[0]
    checkpoints = small_disk / "run" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000002"]
    with checkpoint.load(checkpoints / "step-00000002") as found:
        found.verify()
    resize(small_disk, "4m")
    assert "goes on from step 2 " in run(2, *train(*settings)).ok().text
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000004", "step-00000006"]


def test_an_unreadable_file_is_named_and_the_rest_is_packed(text_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "text"
    shutil.copytree(text_folder, folder)
    (folder / "broken.txt").write_bytes(b"abc\xff\xfe\xfa" * 50)
    outcome = run(
        2, "-m", "mpipar.data", "pack", str(folder), "--out", str(tmp_path / "set"), "--vocab-size", "300"
    ).ok()
    assert outcome.text.count("broken.txt") == 1
    info = run(0, "-m", "mpipar.data", "info", str(tmp_path / "set")).ok()
    documents = [int(line.split()[2]) for line in info.lines if line.split()[:1] in (["train"], ["val"])]
    assert sum(documents) == 20


def test_a_lost_rank_ends_the_job(train: Arguments) -> None:
    job = Job(3, *train("--train.steps", 100_000))
    job.wait_for("step      3/")
    os.kill(job.ranks()[1], 9)
    assert job.finish(30).code != 0
