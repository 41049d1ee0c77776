"""A replica that is not like the others is found, and repaired where a majority knows what is right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mpipar.comm import Communicator
from mpipar.errors import CorruptionError
from mpipar.model import ModelConfig, Transformer, initialise
from mpipar.train.config import Config, DataConfig, RunConfig, TrainConfig
from mpipar.train.dealing import Team
from mpipar.train.source import Source, Stock
from mpipar.train.step import TrainStep
from mpipar.train.verify import verify
from tests.parallel.small_data import write_small_data


@pytest.fixture(params=[True, False], ids=["reproducible", "ordinary"])
def parts(comm: Communicator, shared_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[TrainStep, Source]]:
    """A step of a small model, and what it reads."""
    if comm.rank == 0:
        write_small_data(shared_path / "data")
    comm.barrier()
    config = Config(
        run=RunConfig(dir=shared_path / "run"),
        data=DataConfig(dir=(shared_path / "data",)),
        model=ModelConfig(layers=1, dim=32, heads=2, max_seq_len=32),
        train=TrainConfig(
            global_batch=8, microbatch=2, seq_len=16, eval_sequences=2, precision="fp32", reproducible=request.param
        ),
    )
    model = Transformer(config.model, vocab_size=300)
    initialise(model, 1)
    source = Source(config, Stock.take(config), Team.of(comm, comm.size), None)
    step = TrainStep(model, config, comm)
    for done in range(2):
        assert step.fits()
        step.apply(step.compute(done, source, stop=False))
    yield step, source
    source.close()
    step.replicas.close()


def flip_a_bit(step: TrainStep) -> None:
    weight = step.model.get_parameter("layers.0.attention.wq.weight")
    weight.data.view(torch.int32)[3, 5] ^= 1 << 12


def test_equal_replicas_are_left_alone(comm: Communicator, parts: tuple[TrainStep, Source]) -> None:
    step, source = parts
    before = step.digest()
    assert verify(comm, step, source) == ""
    assert step.digest() == before


def test_the_odd_one_is_repaired(comm: Communicator, parts: tuple[TrainStep, Source]) -> None:
    step, source = parts
    if comm.size < 3:
        pytest.skip("of two nobody is the odd one")
    before = step.digest()
    odd = comm.size - 2
    if comm.rank == odd:
        flip_a_bit(step)
    assert f"rank {odd} had other weights than the rest" in verify(comm, step, source)
    assert step.digest() == before
    assert verify(comm, step, source) == ""


def test_a_corrupt_moment_is_found_too(comm: Communicator, parts: tuple[TrainStep, Source]) -> None:
    step, source = parts
    if comm.size < 3:
        pytest.skip("of two nobody is the odd one")
    if comm.rank == 0:
        state = step.optimizer.state[step.model.get_parameter("norm.weight")]
        state["exp_avg"][2] += 1
    assert "rank 0 had other weights" in verify(comm, step, source)
    assert verify(comm, step, source) == ""


def test_without_a_majority_it_ends(comm: Communicator, parts: tuple[TrainStep, Source]) -> None:
    step, source = parts
    if comm.size % 2:
        pytest.skip("there is always a majority")
    if comm.rank >= comm.size // 2:
        flip_a_bit(step)
    with pytest.raises(CorruptionError, match="no majority") as error:
        verify(comm, step, source)
    assert "all came to the same gradient" in error.value.message


def test_a_broken_processor_is_named(
    comm: Communicator, parts: tuple[TrainStep, Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, source = parts
    if comm.size % 2:
        pytest.skip("there is always a majority")
    if comm.rank >= comm.size // 2:
        flip_a_bit(step)
    if comm.rank == 1:
        results = iter(["one", "another"])
        monkeypatch.setattr(step, "fingerprint", lambda tokens: next(results))
    with pytest.raises(CorruptionError, match="rank 1 came to two results"):
        verify(comm, step, source)
