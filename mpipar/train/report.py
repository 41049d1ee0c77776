"""What a run tells a person beyond its steps: the header, TensorBoard, the picture, a sample of text."""

from __future__ import annotations

from pathlib import Path

import torch

import mpipar
from mpipar.comm import Mesh, mpi_version
from mpipar.model import Transformer, generate
from mpipar.train.config import Config
from mpipar.train.metrics import StepMetrics
from mpipar.train.plot import plot_loss
from mpipar.train.run_folder import RunFolder
from mpipar.train.source import Source


def header(config: Config, mesh: Mesh, source: Source, model: Transformer, *, threads: int, origin: str) -> list[str]:
    """Lines that say what is about to run, on what."""
    train, shards = config.train, source.shards
    ranks, hosts = mesh.world.size, mesh.num_hosts
    most = -(-train.num_microbatches // ranks)
    lines = [
        ("mpipar", f"{mpipar.__version__}, {mpi_version()}, torch {torch.__version__}"),
        ("ranks", f"{_count(ranks, 'rank')} on {_count(hosts, 'host')}, {_count(threads, 'thread')} each"),
        (
            "data",
            f"{config.data.dir}: {shards.num_tokens:,} tokens of {_count(shards.num_documents, 'document')}, "
            f"vocabulary {shards.vocab_size:,}, unigram entropy {shards.unigram_entropy:.3f} nats a token",
        ),
        (
            "model",
            f"{config.model.family}, {config.model.layers} layers, dim {config.model.dim}, {config.model.heads} heads: "
            f"{model.num_parameters():,} parameters, {train.precision}",
        ),
        (
            "step",
            f"{train.global_batch} sequences of {train.seq_len} = {train.global_batch * train.seq_len:,} tokens in "
            f"{_count(train.num_microbatches, 'microbatch')}, at most {most} a rank",
        ),
        ("run", f"{config.run.dir}: {origin}"),
    ]
    if train.num_microbatches < ranks:
        idle = ranks - train.num_microbatches
        few = _count(train.num_microbatches, "microbatch")
        lines.append(
            ("note", f"{_count(idle, 'rank')} will idle: a step has only {few}; make --train.microbatch smaller")
        )
    return [f"{name:<7} {text}" for name, text in lines]


class TensorBoard:
    """The run's events.

    Args:
        folder: Where they are written.
        done: Events of later steps, of a run that was stopped behind its last checkpoint, are taken back.
    """

    def __init__(self, folder: Path, done: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=done + 1)

    def step(self, m: StepMetrics) -> None:
        for name in ("loss", "lr", "grad_norm", "tokens_per_s", "comm_s"):
            self._writer.add_scalar(f"train/{name}", getattr(m, name), m.step)

    def evaluation(self, step: int, val_loss: float) -> None:
        self._writer.add_scalar("val/loss", val_loss, step)

    def close(self) -> None:
        self._writer.close()


def open_tensorboard(folder: Path, done: int) -> TensorBoard | None:
    """The events, where tensorboard is installed."""
    try:
        return TensorBoard(folder, done)
    except ImportError:
        return None


def draw(folder: RunFolder, *, entropy: float, title: str) -> str:
    """Draws loss.png; a line that says where it is, or what is missing."""
    if plot_loss(folder.metrics, folder.plot, entropy=entropy, title=title):
        return f"plot    {folder.plot}"
    return "plot    none: matplotlib is not installed (pip install 'mpipar[plots]')"


def sample(model: Transformer, source: Source, config: Config) -> list[str]:
    """What the model writes when it starts a document of its own."""
    tokenizer = source.shards.read_tokenizer()
    generator = torch.Generator().manual_seed(config.train.seed)
    start = torch.tensor([[tokenizer.end_of_text]])
    tokens = generate(model, start, config.run.sample_tokens, temperature=0.8, top_k=50, generator=generator)
    text = tokenizer.decode(tokens[0, 1:].tolist())
    return ["sample", *(f"  | {line}" for line in text.splitlines())]


def _count(number: int, noun: str) -> str:
    plural = "es" if noun.endswith("ch") else "s"
    return f"{number:,} {noun}{'' if number == 1 else plural}"
