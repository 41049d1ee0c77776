"""What a run tells a person before and after its steps: what is about to run, and what came of it."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence

import torch

import mpipar
from mpipar.amounts import plural
from mpipar.checkpoint import latest
from mpipar.comm import Mesh, mpi_version
from mpipar.data import ShardSet
from mpipar.model import Transformer, generate
from mpipar.train.config import Config
from mpipar.train.device import Placement
from mpipar.train.plot import plot_loss
from mpipar.train.run_folder import RunFolder
from mpipar.train.source import Source
from mpipar.train.step import TrainStep


def header(
    config: Config,
    mesh: Mesh,
    source: Source,
    step: TrainStep,
    placement: Placement,
    *,
    origin: str,
    lacks: Sequence[str] = (),
) -> list[str]:
    """Lines that say what is about to run, on what.

    Args:
        config: The settings.
        mesh: The ranks.
        source: What they read.
        step: What they do.
        placement: Where they do it.
        origin: Where the run begins.
        lacks: What this machine has not, and the run does without.
    """
    train = config.train
    model, unshared = step.model, step.replicas.unshared
    ranks, hosts = mesh.world.size, mesh.num_hosts
    spares = f" ({plural(config.elastic.spares, 'spare')})" if config.elastic.spares else ""
    most = -(-train.num_microbatches // ranks)
    lines = [
        ("mpipar", f"{mpipar.__version__}, {mpi_version()}, torch {torch.__version__}"),
        (
            "ranks",
            f"{plural(ranks, 'rank')} on {plural(hosts, 'host')}{spares}, {plural(train.threads, 'thread')} each",
        ),
        *([("device", placement.said())] if placement.on_gpus else []),
        ("reduce", _how_reduced(mesh.num_hosts, unshared, exactly=train.reproducible)),
        *_what_is_read(config, source),
        (
            "model",
            f"{config.model.family}, {config.model.layers} layers, dim {config.model.dim}, {config.model.heads} heads: "
            f"{model.num_parameters():,} parameters, {train.precision}",
        ),
        (
            "step",
            f"{train.global_batch} sequences of {train.seq_len} = {train.global_batch * train.seq_len:,} tokens in "
            f"{plural(train.num_microbatches, 'microbatch')}, at most {most} a rank",
        ),
        ("run", f"{config.run.dir}: {origin}"),
        *(("note", text) for text in lacks),
    ]
    if train.num_microbatches < ranks:
        idle = ranks - train.num_microbatches
        few = plural(train.num_microbatches, "microbatch")
        lines.append(
            ("note", f"{plural(idle, 'rank')} will idle: a step has only {few}; make --train.microbatch smaller")
        )
    cores = mesh.cores_per_rank
    if placement.on_gpus and step.peak_flops is None:
        names = ", ".join(sorted({gpu.name for gpu in placement.gpus}))
        lines.append(("note", f"no mfu: what {names} can do in {train.precision} is not in the table of train/peak.py"))
    elif train.reproducible and train.threads < cores and not placement.on_gpus:
        lines.append(
            (
                "note",
                f"{plural(cores, 'core')} a rank, of which torch uses {train.threads}: start more ranks, or give "
                f"--train.threads {cores}, which has other bits",
            )
        )
    return [f"{name:<7} {text}" for name, text in lines]


def asked_to_stop(number: signal.Signals, step: int, folder: RunFolder) -> str:
    """What a signal that comes in a step leads to, and what is there if the job does not live to see it."""
    saved = latest(folder.checkpoints)
    onward = f"from {saved.name}" if saved else "from the beginning: nothing is saved yet"
    if number == signal.SIGINT:
        return f"stop    interrupted in step {step}; --resume auto goes on {onward}"
    return (
        f"stop    {number.name} in step {step}: the run is saved within two steps and ends. If it is killed before, as "
        f"after Ctrl-C of mpirun, --resume auto goes on {onward}{', or a later one' if saved else ''}"
    )


def last_words(
    config: Config, folder: RunFolder, source: Source, step: TrainStep, done: int, val_loss: float
) -> Iterator[str]:
    """Lines that say what came of it, after `done` steps. Draws loss.png on the way. For one rank."""
    ranks = step.replicas.comm.size
    title = f"{folder.path.name}: {step.model.num_parameters() / 1e6:.1f} M parameters, {ranks} ranks"
    yield f"plot    {plot_loss(folder.metrics, folder.plot, entropy=source.unigram_entropy, title=title)}"
    if done < config.train.steps:
        yield f"stopped: {done} of {config.train.steps} steps, {folder.path}; --resume auto goes on"
        return
    if config.run.sample_tokens:
        yield from _sample(step.model, source, config)
    yield f"digest: {step.digest()}"
    yield f"done: {done} steps, val_loss {val_loss:.4f}, {folder.path}"


def _what_is_read(config: Config, source: Source) -> list[tuple[str, str]]:
    """The data set, or the mixture and its parts."""
    held = [_what_it_holds(shards) for shards in source.sets]
    apart = ", documents kept apart" if config.data.documents == "separate" else ""
    known = f"vocabulary {source.vocab_size:,}, unigram entropy {source.unigram_entropy:.3f} nats a token{apart}"
    if len(held) == 1:
        return [("data", f"{config.data.dir[0]}: {held[0]}, {known}")]
    lines = [("data", f"{len(held)} data sets, mixed sequence by sequence: {known}")]
    shares = source.samples.mixture.shares
    epochs = config.data.epochs or (0,) * len(held)
    for folder, share, holds, passes in zip(config.data.dir, shares, held, epochs, strict=True):
        ends = f", ends after {plural(passes, 'epoch')}" if passes else ""
        lines.append(("mix", f"{share:6.2%} {folder}: {holds}{ends}"))
    return lines


def _what_it_holds(shards: ShardSet) -> str:
    counted = f" ({shards.num_counted:,} count)" if shards.num_counted < shards.num_tokens else ""
    return f"{shards.num_tokens:,} tokens{counted} of {plural(shards.num_documents, 'document')}"


def _sample(model: Transformer, source: Source, config: Config) -> list[str]:
    """What the model writes when it starts a document of its own."""
    tokenizer = source.read_tokenizer()
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(config.train.seed)
    start = torch.tensor([[tokenizer.end_of_text]], device=device)
    model.eval()
    tokens = generate(model, start, config.run.sample_tokens, temperature=0.8, top_k=50, generator=generator)
    text = tokenizer.decode(tokens[0, 1:].tolist())
    return ["sample", *(f"  | {line}" for line in text.splitlines())]


def _how_reduced(num_hosts: int, unshared: str | None, *, exactly: bool) -> str:
    """How gradients are added up and where, or why not in shared memory."""
    how = "exactly, " if exactly else ""
    if unshared is not None:
        return f"{how}in memory of each rank's own: {unshared}"
    between = "" if num_hosts == 1 else f" on each of {num_hosts} hosts, round rings between them"
    return f"{how}in shared memory{between}"
