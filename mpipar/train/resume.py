"""Where a run goes on from: finding the checkpoint, refusing one that does not fit, giving its state to all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

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

# What checkpoints of a version without the setting were made with.
_EARLIER = {("train", "device"): "cpu"}

_HEX_DIGITS = 64  # of a SHA-256

# What of a model its weights do not depend on.
_MAY_DIFFER = {"max_seq_len", "dropout"}


class Origin(NamedTuple):
    """Where a run begins.

    Args:
        checkpoint: What it goes on from, or begins with; None for a model of its own.
        weights_only: Whether only the weights are taken: a fresh start.
        said: For people.
    """

    checkpoint: Path | None
    weights_only: bool
    said: str


def prepare(config: Config, folder: RunFolder, identity: Mapping[str, Any]) -> Origin:
    """Makes the run folder and decides where the run begins. For one rank.

    Args:
        config: The settings; `resume` is auto, never, or a folder.
        folder: The run folder.
        identity: What tells one sequence of samples from another; that of the source.

    Raises:
        CheckpointError: The checkpoint is damaged or does not fit the settings.
        ConfigError: The run folder cannot be used.
    """
    said = "a fresh start"
    if config.resume == "never" and folder.holds_a_run() and not started_again():
        said = f"a fresh start; the earlier run is now {folder.move_aside()}"
    path = _find(config, folder)
    weights_only = False
    if path is not None:
        with checkpoint.load(path) as found:
            _require_fit(config, identity, found)
            said = f"goes on from step {found.step:,} ({path})"
    elif config.init is not None:
        path, weights_only = _in_folder(config.init, "--init"), True
        with checkpoint.load(path) as found:
            _require_same_model(config, identity, found)
            said += f", with the weights of step {found.step:,} ({path})"
    folder.create()
    folder.claim()
    folder.tidy()
    folder.write_config(to_toml(config))
    return Origin(path, weights_only, said)


def load(origin: Origin, step: TrainStep, comm: Communicator) -> int:
    """Collective: gives all ranks the state of the checkpoint. Returns the steps that are done."""
    if origin.checkpoint is None:
        return 0
    tensors, done, attributes = read(origin.checkpoint, comm, checkpoint.WEIGHTS if origin.weights_only else "")
    with agreement(comm):
        checkpoint.restore(step.model, step.optimizer, tensors, source=str(origin.checkpoint))
    if origin.weights_only:
        return 0
    step.tokens_seen = attributes["tokens_seen"]
    step.skipped_in_a_row = attributes["skipped_in_a_row"]
    if step.grids is not None:
        step.grids.tops = dict(attributes["grid_tops"])
    if step.scale is not None:
        step.scale.restore(attributes.get("loss_scale", {}))
    return done


def read(path: Path, comm: Communicator, prefix: str = "") -> tuple[dict[str, Tensor], int, dict[str, Any]]:
    """Collective: (all tensors, the step, what else was kept) of a checkpoint, on all ranks.

    Each byte is read and checked by one of the ranks that see the folder, and passed on: each reads as many rows of
    a large tensor.

    Args:
        path: Its folder.
        comm: The ranks.
        prefix: Tensors whose names begin otherwise are left out.

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
                wanted = [name for name in found if name.startswith(prefix)]
                facts = found.step, found.attributes, {name: found.describe(name) for name in wanted}
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
        "loss_scale": {} if step.scale is None else step.scale.state(),
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
    found = _in_folder(path, "--resume", "auto, never, or ")
    of_another = folder.checkpoints.resolve() not in found.resolve().parents
    if of_another and folder.holds_a_run() and not started_again():
        raise ConfigError(
            f"--resume {path} is of another run than the one in --run.dir {folder.path}, and would take its place: "
            "give a new --run.dir"
        )
    return found


def _in_folder(path: Path, given: str, others: str = "") -> Path:
    """The latest checkpoint of a run; or the folder itself."""
    if not path.is_dir():
        raise ConfigError(f"{given} {path} is not a folder: give {others}the folder of a checkpoint or a run")
    return checkpoint.latest(path / "checkpoints") or checkpoint.latest(path) or path


def _require_same_model(config: Config, identity: Mapping[str, Any], found: Checkpoint) -> None:
    """Raises CheckpointError if these weights would be another function here."""
    then, now = found.attributes["config"]["model"], to_table(config)["model"]
    keys = sorted((then.keys() | now.keys()) - _MAY_DIFFER)
    values = [(flag("model", key), then.get(key), now.get(key)) for key in keys]
    values += [(f"the data's {key}", found.attributes.get(key), identity[key]) for key in ("vocab_size", "tokenizer")]
    _require_equal(values, f"{found.path} is of another model", "Give the settings and the tokenizer it was made with")


def _require_fit(config: Config, identity: Mapping[str, Any], found: Checkpoint) -> None:
    """Raises CheckpointError if the run would not be the one that the checkpoint is of."""
    _require_origin(config, found)
    then, now = found.attributes["config"], to_table(config)
    compared = [("model", key) for key in sorted(then["model"].keys() | now["model"].keys())] + list(_MUST_MATCH)
    if config.train.reproducible:
        compared += reproducible.MUST_MATCH
    values = [(flag(*key), then[key[0]].get(key[1], _EARLIER.get(key)), now[key[0]].get(key[1])) for key in compared]
    values += [(f"the data's {key}", found.attributes.get(key), value) for key, value in identity.items()]
    advice = "Give the settings it was made with, or start a new run with another --run.dir or --resume never"
    _require_equal(values, f"{found.path} is of another run", advice)
    if found.step > config.train.steps:
        raise CheckpointError(f"{found.path} is past --train.steps {config.train.steps}: ask for more steps")


def _require_origin(config: Config, found: Checkpoint) -> None:
    """Raises CheckpointError if --init would be without effect, where the run did not begin with it."""
    began = found.attributes["config"].get("init")
    if config.init is not None and (began is None or Path(began).resolve() != config.init.resolve()):
        how = "without it" if began is None else f"with {began}"
        raise CheckpointError(
            f"--init {config.init}: {found.path} is of a run that began {how}. To go on with that run leave --init "
            "out; to begin another give another --run.dir, or --resume never"
        )


def _require_equal(values: Sequence[tuple[str, Any, Any]], problem: str, advice: str) -> None:
    """Raises CheckpointError that lists the settings, as (name, then, now), which differ."""
    differences = [f"{name} was {_shown(then)} and is {_shown(now)}" for name, then, now in values if then != now]
    if differences:
        raise CheckpointError(f"{problem}: {'; '.join(differences)}. {advice}")


def _shown(value: Any) -> str:
    """Of a checksum so much as tells it from others."""
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == _HEX_DIGITS else repr(value)
