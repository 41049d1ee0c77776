"""The run: from settings to a trained model.

    open the data  ->  find where to go on from  ->  build, load  ->  steps, evaluations, checkpoints  ->  done

Everything that reaches the outside (the terminal, the run folder) is rank 0's; everything that may fail on one rank
(opening data, reading validation sequences, writing a checkpoint) is followed by an agreement of all.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from mpipar.checkpoint import discard_after
from mpipar.comm import Communicator, Grid, Mesh, agreement, decide_on_root
from mpipar.errors import DivergedError
from mpipar.model import Transformer, initialise
from mpipar.train import report, reproducible, resume
from mpipar.train.config import Config
from mpipar.train.memory import keep_freed_memory
from mpipar.train.metrics import StepMetrics, Totals
from mpipar.train.plot import plot_loss
from mpipar.train.record import Record
from mpipar.train.run_folder import RunFolder, writing
from mpipar.train.source import Source
from mpipar.train.step import TrainStep, bf16_is_fast
from mpipar.train.stop import StopRequest
from mpipar.train.terminal import Terminal


def train(config: Config, world: Communicator, stop: StopRequest) -> None:
    """Trains the model that the settings describe. Collective over all ranks of the job.

    Args:
        config: The settings, the same on all ranks.
        world: All ranks of the job.
        stop: Whether this rank is asked to stop.
    """
    keep_freed_memory()
    mesh = Mesh(world, Grid.of(world.size))
    comm = mesh["dp"]
    config = resolve(config, mesh)
    torch.set_num_threads(config.train.threads)
    if config.train.reproducible:
        reproducible.prepare(config, world)
    with agreement(world):
        source = Source(config, comm)
    identity = {
        "vocab_size": source.shards.vocab_size,
        "tokenizer": source.shards.tokenizer_id,
        "num_tokens": source.shards.num_tokens,
    }
    folder = RunFolder(config.run.dir)
    path, said = decide_on_root(world, lambda: resume.prepare(config, folder, identity))

    model = build_model(config, source.shards.vocab_size)
    step = TrainStep(model, config, comm)
    done = resume.load(path, step, comm)
    terminal = Terminal(speaks=comm.rank == 0, log_every=config.run.log_every)
    for line in report.header(config, mesh, source, step, origin=said):
        terminal.say(line)
    try:
        Run(config, comm, folder, source, step, terminal, identity).finish(done, stop)
    finally:
        source.close()
        folder.release()


def build_model(config: Config, vocab_size: int) -> Transformer:
    """The model with its initial weights."""
    model = Transformer(
        config.model, vocab_size=vocab_size, checkpoint_activations=config.train.activation_checkpointing
    )
    initialise(model, config.train.seed)
    return model


def resolve(config: Config, mesh: Mesh) -> Config:
    """The settings with nothing left to a rule or to the machine. Collective, since ranks must round alike."""
    train = config.train
    if train.precision == "auto":
        everywhere = all(mesh.world.all_gather_object(bf16_is_fast()))
        train = replace(train, precision="bf16" if everywhere else "fp32")
    if train.threads == 0:
        # One number for all ranks: a product that is cut over another number of threads need not have the same bits.
        cores = min(mesh.world.all_gather_object(mesh.cores_per_rank()))
        train = replace(train, threads=1 if train.reproducible else cores)
    return replace(config, model=config.model.resolved(), train=train)


class Run:
    """The steps of a run, and what is kept of them."""

    def __init__(
        self,
        config: Config,
        comm: Communicator,
        folder: RunFolder,
        source: Source,
        step: TrainStep,
        terminal: Terminal,
        identity: dict[str, object],
    ):
        self._config = config
        self._comm = comm
        self._folder = folder
        self._source = source
        self._step = step
        self._terminal = terminal
        self._identity = identity

    def finish(self, done: int, stop: StopRequest) -> None:
        """Runs the steps that follow `done` finished ones, to the last or until the job is asked to stop."""
        config, root = self._config, self._comm.rank == 0
        if root:
            with writing(self._folder.checkpoints):
                discard_after(self._folder.checkpoints, done)
        self._terminal.begin(config.train.steps, done)
        record = Record(self._folder, self._terminal, done=done, keeps=root, tensorboard=config.run.tensorboard)
        try:
            done, val_loss = self._run_steps(done, record, stop)
        finally:
            record.close()
        if root:
            self._conclude(done, val_loss if done == config.train.steps else None)

    def _run_steps(self, done: int, record: Record, stop: StopRequest) -> tuple[int, float]:
        """The steps. Returns how many are done, and the last validation loss."""
        config = self._config
        asked, val_loss = False, math.nan
        while done < config.train.steps and not asked:
            measured, asked = self._step(done, self._source, stop=stop.asked)
            done += 1
            record.step(measured)
            self._give_up_if_diverged(measured)
            last = done == config.train.steps
            if last or done % config.train.eval_every == 0:
                val_loss = self._evaluate(done)
                record.evaluation(done, measured.tokens, val_loss)
            if last or asked or done % config.checkpoint.every == 0:
                self._save(done, record)
        if math.isnan(val_loss) and done == config.train.steps:
            val_loss = self._evaluate(done)  # there was no step left; what is recorded of the last one stays
        return done, val_loss

    def _give_up_if_diverged(self, measured: StepMetrics) -> None:
        if self._step.skipped_in_a_row < self._config.train.max_skipped:
            return
        with agreement(self._comm):
            raise DivergedError(
                f"the loss or a gradient was not finite in {self._step.skipped_in_a_row} steps in a row, up to step "
                f"{measured.step}. Try a smaller --train.lr, more --train.warmup-steps, or --train.precision fp32; the "
                f"checkpoints in {self._folder.path} are as they were"
            )

    def _evaluate(self, done: int) -> float:
        """Collective: the mean loss over the validation sequences, in nats a token."""
        with agreement(self._comm):
            mine = Totals(np.zeros(self._source.num_validation))
            self._step.evaluate(self._source.validation(), mine)
        totals = Totals.unpack(self._comm.all_reduce(mine.pack()))
        val_loss = totals.loss_sum / totals.num_tokens
        self._terminal.evaluation(done, val_loss, self._source.shards.unigram_entropy)
        return val_loss

    def _save(self, done: int, record: Record) -> None:
        """Collective: a checkpoint."""
        with agreement(self._comm):
            record.sync()
            if self._comm.rank == 0:
                resume.save(self._folder, done, self._step, self._config, self._identity)

    def _conclude(self, done: int, val_loss: float | None) -> None:
        """Draws the run, shows a sample, and says the last word. On rank 0."""
        config, entropy = self._config, self._source.shards.unigram_entropy
        name, millions = self._folder.path.name, self._step.model.num_parameters() / 1e6
        title = f"{name}: {millions:.1f} M parameters, {self._comm.size} ranks"
        drawn = plot_loss(self._folder.metrics, self._folder.plot, entropy=entropy, title=title)
        self._terminal.say(f"plot    {drawn}")
        if val_loss is None:
            self._terminal.say(
                f"stopped: {done} of {config.train.steps} steps, {self._folder.path}; --resume auto goes on"
            )
            return
        if config.run.sample_tokens:
            for line in report.sample(self._step.model, self._source, config):
                self._terminal.say(line)
        self._terminal.say(f"digest: {self._step.digest()}")
        self._terminal.say(f"done: {done} steps, val_loss {val_loss:.4f}, {self._folder.path}")
