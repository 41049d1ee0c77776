"""The run: from settings to a trained model.

    open the data  ->  find where to go on from  ->  build, load  ->  steps, evaluations, checkpoints  ->  done

Everything that reaches the outside (the terminal, the run folder) is rank 0's; everything that may fail on one rank
(opening data, reading validation sequences, writing a checkpoint) is followed by an agreement of all.
"""

from __future__ import annotations

import signal
from collections import deque
from typing import Literal

import torch

from mpipar import checkpoint
from mpipar.checkpoint import discard_after
from mpipar.comm import (
    Communicator,
    Grid,
    Mesh,
    agreement,
    attempt,
    can_survive,
    decide_on_root,
    part,
    start_watchdog,
)
from mpipar.errors import CheckpointError, DivergedError, LostRanksError
from mpipar.model import Transformer, initialise
from mpipar.supervised import SignsOfLife
from mpipar.train import report, reproducible, resume
from mpipar.train.config import Config
from mpipar.train.dealing import Team, open_counter
from mpipar.train.device import start
from mpipar.train.elastic import Losses
from mpipar.train.memory import keep_freed_memory
from mpipar.train.metrics import StepMetrics, Totals
from mpipar.train.out_of_memory import explained
from mpipar.train.record import Record
from mpipar.train.resolve import resolve
from mpipar.train.run_folder import RunFolder, writing
from mpipar.train.saver import Ending, Saver
from mpipar.train.source import Source, Stock
from mpipar.train.step import TrainStep
from mpipar.train.stop import StopRequest
from mpipar.train.stragglers import Stragglers
from mpipar.train.terminal import Terminal
from mpipar.train.verify import verify

Task = Literal["take_over", "settle", "evaluate", "verify", "save", "conclude"]


def train(config: Config, world: Communicator, stop: StopRequest) -> bool:
    """Trains the model that the settings describe. Collective over all ranks of the job.

    Returns whether all steps are done: it may have been asked to stop before.

    Args:
        config: The settings, the same on all ranks.
        world: All ranks of the job.
        stop: Whether this rank is asked to stop.
    """
    keep_freed_memory()
    mesh = Mesh(world, Grid.of(world.size))
    comm = mesh["dp"]
    config, placement = resolve(config, mesh)
    device = placement.device(world.rank)
    workers = max(1, comm.size - config.elastic.spares)
    torch.set_num_threads(config.train.threads)
    if config.train.reproducible:
        reproducible.prepare(config, world, placement)
    start(device, config.train.precision)
    claims = config.elastic.balance and config.train.reproducible and comm.size > 1
    lacks = [placement.note] if placement.note else []
    counter = open_counter(comm) if claims else None
    if isinstance(counter, str):
        lacks.append(f"ranks get equal numbers of microbatches, however fast they are: {counter}")
        counter = None
    stock = decide_on_root(world, lambda: Stock.take(config))
    with agreement(world):
        source = Source(config, stock, Team.of(comm, workers), counter, device)
    folder = RunFolder(config.run.dir)
    origin = decide_on_root(world, lambda: resume.prepare(config, folder, source.identity))

    if can_survive() and config.elastic.hang_s > 0:
        unwatched = start_watchdog(world, config.elastic.hang_s)
        lacks += [f"a rank that hangs will not be ended: {unwatched}"] if unwatched else []
    with explained(config, device, folder.path, world.rank, placement.sharing(world.rank)):
        step = TrainStep(build_model(config, source.vocab_size).to(device), config, comm, placement)
        done = resume.load(origin, step, comm)
        terminal = Terminal(speaks=comm.rank == 0, log_every=config.run.log_every)
        for line in report.header(config, mesh, source, step, placement, origin=origin.said, lacks=lacks):
            terminal.say(line)
        try:
            run = Run(config, mesh, workers, folder, source, step, terminal)
            return run.finish(done, stop)
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


class Run:
    """The steps of a run, and what is kept of them.

    It goes from task to task: a step, an evaluation, a checkpoint. Each is attempted by all ranks together; where some
    die the others go on with the same task, as a smaller team (`_survive`). Between tasks all ranks are at the same
    place, so there is nothing to be taken back.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        workers: int,
        folder: RunFolder,
        source: Source,
        step: TrainStep,
        terminal: Terminal,
    ):
        self._config = config
        self._mesh = mesh
        self._comm = mesh["dp"]
        self._workers = workers
        self._folder = folder
        self._source = source
        self._step = step
        self._terminal = terminal
        self._signs = SignsOfLife()
        self._record = Record(folder, terminal, tensorboard=config.run.tensorboard)
        self._saver = Saver(
            folder.checkpoints,
            self._comm,
            asynchronous=config.checkpoint.asynchronous,
            cores=mesh.cores_per_rank,
        )
        self._stragglers = Stragglers(every=max(10, config.run.log_every))
        self._done = 0
        self._asked = False
        self._todo: deque[Task] = deque()  # before the next step
        self._losses = Losses(config.elastic.min_ranks, leads=self._leads)
        self._save_again = False  # the dead have left a checkpoint half-written
        self._tasks = {
            "take_over": self._take_over,
            "settle": self._settle,
            "evaluate": self._evaluate,
            "verify": self._verify,
            "save": self._save,
            "conclude": self._conclude,
        }

    def finish(self, done: int, stop: StopRequest) -> bool:
        """Runs the steps that follow `done` finished ones, to the last or until the job is asked to stop.

        Returns whether all are done.
        """
        self._done = done
        if self._leads:
            with writing(self._folder.checkpoints):
                discard_after(self._folder.checkpoints, done)
            self._signs.give(done)  # from here on the run folder is of this run
            self._record.keep(done)
        self._terminal.begin(self._config.train.steps, done)
        if done == self._config.train.steps:
            self._todo += ["evaluate", "conclude"]  # there is no step left; what is recorded of the last one stays
        try:
            with stop.told(self._tell_of):
                while self._todo or not self._is_over:
                    try:
                        self._go_on(stop)
                    except LostRanksError:
                        self._survive()
        finally:
            self._record.close()
        if can_survive():
            part(self._mesh.world)
        return self._done == self._config.train.steps

    def _tell_of(self, number: signal.Signals) -> None:
        """Says at once what a signal leads to: what mpirun gives its ranks after Ctrl-C is no time for a step."""
        if self._leads:
            self._terminal.say(report.asked_to_stop(number, self._done + 1, self._folder))

    @property
    def _leads(self) -> bool:
        """Whether this rank shows the run, and writes what is kept of it."""
        return self._comm.rank == 0

    @property
    def _is_over(self) -> bool:
        return self._asked or self._done == self._config.train.steps

    def _go_on(self, stop: StopRequest) -> None:
        """The next task."""
        if self._todo:
            self._tasks[self._todo[0]]()
            self._todo.popleft()
            return
        computed = attempt(self._mesh.world, lambda: self._step.compute(self._done, self._source, stop=stop.asked))
        if not self._step.fits():
            which = computed.totals.describe_faults()
            self._terminal.say(f"again   step {self._done + 1}: gradients of {which} are too large for their grids")
            return
        measured = self._step.apply(computed)
        self._done += 1
        self._asked = computed.totals.stop
        self._todo += self._tasks_after(self._done)
        self._source.dealing.learn(computed.totals.counts.tolist(), computed.totals.seconds.tolist())
        self._record.step(measured)
        if self._leads:
            self._signs.give(self._done)
        if slow := self._stragglers.look(measured.rank_s):
            self._terminal.say(f"slow    {slow}")
        self._give_up_if_diverged(measured)

    def _tasks_after(self, done: int) -> list[Task]:
        """What follows a step."""
        config, last = self._config, done == self._config.train.steps
        tasks: list[Task] = ["settle"] if self._saver.pending else []
        if last or done % config.train.eval_every == 0:
            tasks.append("evaluate")
        saves = last or self._asked or done % config.checkpoint.every == 0
        verify_every = config.elastic.verify_every
        if verify_every and self._comm.size > 1 and (saves or done % verify_every == 0):
            tasks.append("verify")
        if saves:
            tasks.append("save")
        if last or self._asked:
            tasks.append("conclude")
        return tasks

    def _survive(self) -> None:
        """Collective between the living: goes on without the ranks that have died."""
        self._mesh = self._losses.leave_behind(self._mesh, self._step.move_to, step=self._done + 1)
        self._comm = self._mesh["dp"]
        self._saver.move_to(self._comm)
        self._source.dealing.move_to(Team.of(self._comm, self._workers))
        if "take_over" not in self._todo:
            self._todo.appendleft("take_over")

    def _take_over(self) -> None:
        """Collective: the first of those who are left leads, and says who is not."""

        def take_over() -> None:
            self._save_again |= self._saver.abandon()
            self._losses.take_over(self._comm, self._lead)

        attempt(self._mesh.world, take_over)
        self._terminal.say(f"lost    {self._losses.tell()}")
        if self._save_again and "save" not in self._todo:
            self._todo.append("save")
        self._save_again = False

    def _lead(self) -> None:
        """From now on this rank does."""
        self._folder.take_over()
        self._record.keep(self._done)
        self._terminal.take_over(self._done)

    def _give_up_if_diverged(self, measured: StepMetrics) -> None:
        if self._step.skipped_in_a_row < self._config.train.max_skipped:
            return
        self._settle()
        with agreement(self._comm):
            raise DivergedError(
                f"the loss or a gradient was not finite in {self._step.skipped_in_a_row} steps in a row, up to step "
                f"{measured.step}. Try a smaller --train.lr, more --train.warmup-steps, or --train.precision fp32; the "
                f"checkpoints in {self._folder.path} are as they were"
            )

    def _evaluate(self) -> None:
        """Collective: the mean loss over validation sequences, in nats a token, of the mixture and of each data set."""

        def evaluate() -> dict[str, Totals]:
            validations = self._source.validations
            mine = {name: Totals.none(v.num_microbatches, self._comm.size) for name, v in validations.items()}
            with agreement(self._comm):
                for name, validation in validations.items():
                    self._step.evaluate(validation.microbatches(), mine[name])
            return {name: totals.unpack(self._comm.all_reduce(totals.pack())) for name, totals in mine.items()}

        totals = attempt(self._mesh.world, evaluate)
        losses = {name: found.loss_sum / found.num_tokens for name, found in totals.items() if found.num_tokens}
        val_loss = losses.pop("")
        self._record.evaluation(self._done, self._step.tokens_seen, val_loss, losses, self._source.unigram_entropy)

    def _verify(self) -> None:
        """Collective: compares the replicas' weights."""
        found = attempt(self._mesh.world, lambda: verify(self._comm, self._step, self._source))
        if found:
            self._terminal.say(f"verify  {found} (step {self._done})")

    def _save(self) -> None:
        """Collective: begins a checkpoint; the last one of the run is there when this returns."""

        def save() -> list[Ending | None]:
            earlier = self._saver.settle(wait=True)
            with agreement(self._comm):
                if self._leads:
                    with self._mesh.world.progress.pulse.silent():
                        self._record.sync()
            notes = resume.notes(self._done, self._step, self._config, self._source.identity)
            begun = self._saver.begin(notes, checkpoint.capture(self._step.model, self._step.optimizer))
            return [earlier, begun or (self._saver.settle(wait=True) if self._is_over else None)]

        for ending in attempt(self._mesh.world, save):
            self._report(ending)

    def _settle(self) -> None:
        """Collective: a look at the checkpoint that is being written; before the next one it is waited for."""
        waits = "save" in self._todo or self._step.skipped_in_a_row >= self._config.train.max_skipped
        self._report(attempt(self._mesh.world, lambda: self._saver.settle(wait=waits)))

    def _report(self, ending: Ending | None) -> None:
        """Collective: says what came of a checkpoint. If it was to be the last, the run fails with it."""
        if ending is None:
            return
        if ending.failure is None:
            if self._leads:
                self._signs.give(self._done, saved=ending.step)
            return
        if self._is_over and ending.step == self._done:
            with agreement(self._comm):
                raise CheckpointError(
                    f"{ending.failure.message}. Make room, and the same command goes on from the last of them",
                    rank=ending.failure.rank,
                )
        self._terminal.say(f"save    {ending.failure}; training goes on, the next checkpoint is another try")

    def _conclude(self) -> None:
        """Collective: draws the run, shows a sample, and says the last word."""

        def conclude() -> None:
            if self._leads:
                with self._mesh.world.progress.pulse.silent():
                    self._record.close()
                    for line in report.last_words(
                        self._config, self._folder, self._source, self._step, self._done, self._record.val_loss
                    ):
                        self._terminal.say(line)

        attempt(self._mesh.world, conclude)
