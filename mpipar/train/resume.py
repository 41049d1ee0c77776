"""Where a run goes on from: finding the checkpoint, refusing one that does not fit, giving its state to all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpipar import checkpoint
from mpipar.checkpoint import Box, Checkpoint
from mpipar.checkpoint.write import Notes
from mpipar.comm import Communicator, agreement
from mpipar.errors import CheckpointError, ConfigError
from mpipar.supervised import started_again
from mpipar.train import reproducible
from mpipar.train.config import Config, flag
from mpipar.train.config_text import to_table, to_toml
from mpipar.train.run_folder import RunFolder
from mpipar.train.step import TrainStep

_SHARED_BYTES = 1 << 20  # a tensor from which on its reading is shared out

# A checkpoint of other values is of another model, or of another sequence of batches.
_MUST_MATCH = (("train", "seed"), ("train", "seq_len"), ("train", "global_batch"))


def prepare(config: Config, folder: RunFolder, identity: Mapping[str, Any]) -> tuple[Path | None, str]:
    """Makes the run folder and decides where the run begins. For one rank.

    Args:
        config: The settings; `resume` is auto, never, or a folder.
        folder: The run folder.
        identity: What tells one data set from another: vocab_size, tokenizer, num_tokens.

    Returns:
        The checkpoint to go on from, if any, and a line that says what was decided.

    Raises:
        CheckpointError: The checkpoint is damaged or does not fit the settings.
        ConfigError: The run folder cannot be used.
    """
    said = "a fresh start"
    if config.resume == "never" and folder.holds_a_run() and not started_again():
        said = f"a fresh start; the earlier run is now {folder.move_aside()}"
    path = _find(config, folder)
    if path is not None:
        with checkpoint.load(path) as found:
            _require_fit(config, identity, found)
            said = f"goes on from step {found.step:,} ({path})"
    folder.create()
    folder.claim()
    folder.tidy()
    folder.write_config(to_toml(config))
    return path, said


def load(path: Path | None, step: TrainStep, comm: Communicator) -> int:
    """Collective: gives all ranks the state of the checkpoint. Returns the steps that are done."""
    if path is None:
        return 0
    tensors, done, attributes = read(path, comm)
    with agreement(comm):
        checkpoint.restore(step.model, step.optimizer, tensors, source=str(path))
    step.tokens_seen = attributes["tokens_seen"]
    step.skipped_in_a_row = attributes["skipped_in_a_row"]
    if step.grids is not None:
        step.grids.tops = dict(attributes["grid_tops"])
    return done


def read(path: Path, comm: Communicator) -> tuple[dict[str, Tensor], int, dict[str, Any]]:
    """Collective: (all tensors, the step, what else was kept) of a checkpoint, on all ranks.

    Each byte is read and checked by one of the ranks that see the folder, and passed on: each reads as many rows of
    a large tensor.

    Raises:
        CheckpointError: It is damaged; on one rank. On the others a PeerError.
    """
    sees: list[bool] = comm.all_gather_object(path.is_dir())
    readers = [rank for rank, its in enumerate(sees) if its]
    shares: dict[str, dict[int, Box]] = {}
    tensors: dict[str, Tensor] = {}
    facts = None
    with ExitStack() as stack:
        with agreement(comm):
            found = stack.enter_context(checkpoint.load(path)) if sees[comm.rank] else None
            if found is not None and comm.rank == readers[0]:
                facts = found.step, found.attributes, {name: found.describe(name) for name in found}
        done, attributes, layout = comm.broadcast_object(facts, readers[0])
        with agreement(comm):
            for number, (name, (shape, dtype)) in enumerate(layout.items()):
                shares[name] = _shares(shape, dtype, readers, number)
                tensors[name] = torch.empty(shape, dtype=dtype)
                mine = shares[name].get(comm.rank)
                if found is not None and mine is not None:
                    found.read_into(name, mine, tensors[name][mine.index])
    for name, tensor in tensors.items():
        counts = {rank: share.size for rank, share in shares[name].items()}
        sizes = [counts.get(rank, 0) * tensor.element_size() for rank in range(comm.size)]
        comm.all_gather(tensor.view(-1).view(torch.uint8), sizes)
    return tensors, done, attributes


def _shares(shape: tuple[int, ...], dtype: torch.dtype, readers: Sequence[int], number: int) -> dict[int, Box]:
    """What each reader reads of a tensor: an equal run of rows; a small tensor is read by one, the next by another."""
    whole = Box.whole(shape)
    if whole.size * dtype.itemsize < _SHARED_BYTES or whole.num_rows < len(readers):
        return {readers[number % len(readers)]: whole}
    bounds = [whole.num_rows * i // len(readers) for i in range(len(readers) + 1)]
    return {reader: whole.rows(*run) for reader, run in zip(readers, pairwise(bounds), strict=True)}


def notes(done: int, step: TrainStep, config: Config, identity: Mapping[str, Any]) -> Notes:
    """What a checkpoint keeps beside the tensors."""
    attributes = {
        "tokens_seen": step.tokens_seen,
        "skipped_in_a_row": step.skipped_in_a_row,
        "grid_tops": {} if step.grids is None else dict(step.grids.tops),
        "config": to_table(config),
        **identity,
    }
    texts = {"config.toml": to_toml(config)}
    return Notes(done, attributes, texts, config.checkpoint.keep, config.checkpoint.keep_every)


def _find(config: Config, folder: RunFolder) -> Path | None:
    """The checkpoint that --resume means. When a supervisor repeats the command, the run's own if there is one."""
    own = checkpoint.latest(folder.checkpoints)
    if config.resume in ("auto", "never") or (own is not None and started_again()):
        return own
    path = Path(config.resume)
    if not path.is_dir():
        raise ConfigError(f"--resume {path} is not a folder: give auto, never, or the folder of a checkpoint or a run")
    found = checkpoint.latest(path / "checkpoints") or checkpoint.latest(path) or path
    of_another = folder.checkpoints.resolve() not in found.resolve().parents
    if of_another and folder.holds_a_run() and not started_again():
        raise ConfigError(
            f"--resume {path} is of another run than the one in --run.dir {folder.path}, and would take its place: "
            "give a new --run.dir"
        )
    return found


def _require_fit(config: Config, identity: Mapping[str, Any], found: Checkpoint) -> None:
    """Raises CheckpointError if the run would not be the one that the checkpoint is of."""
    then, now = found.attributes["config"], to_table(config)
    compared = [("model", key) for key in sorted(then["model"].keys() | now["model"].keys())] + list(_MUST_MATCH)
    if config.train.reproducible:
        compared += reproducible.MUST_MATCH
    values = [(flag(*key), then[key[0]].get(key[1]), now[key[0]].get(key[1])) for key in compared]
    values += [(f"the data's {key}", found.attributes.get(key), value) for key, value in identity.items()]
    differences = [(name, was, is_now) for name, was, is_now in values if was != is_now]
    if differences:
        what = "; ".join(f"{name} was {was!r} and is {is_now!r}" for name, was, is_now in differences)
        raise CheckpointError(
            f"{found.path} is of another run: {what}. Give the settings it was made with, or start a new run with "
            "another --run.dir or --resume never"
        )
    if found.step > config.train.steps:
        raise CheckpointError(f"{found.path} is past --train.steps {config.train.steps}: ask for more steps")
