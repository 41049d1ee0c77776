"""One step of training: microbatches to gradients, gradients to a new model.

    this rank's microbatches    forward, backward; gradients add up, and are reduced during the last backward
    reduce                      gradients, loss and token count become those of the whole step, on every rank
    update                      divided by the token count, clipped, applied; every rank comes to the same weights

The loss is a sum over tokens, divided once, here, by the number of tokens in the step. Who computed which microbatch
does not enter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch

from mpipar import checkpoint
from mpipar.comm import Communicator, agreement
from mpipar.data import Microbatch, Sequences
from mpipar.errors import DataError
from mpipar.model import Transformer, begin_microbatch
from mpipar.parallel import DataParallel, Grids
from mpipar.train.config import Config
from mpipar.train.metrics import Clock, PeakMemory, StepMetrics, Totals
from mpipar.train.optimizer import build_optimizer, learning_rate


@dataclass(frozen=True)
class Computed:
    """What the ranks have computed of a step, the same on all but for the times.

    Args:
        step: Steps finished before.
        totals: Of the whole step.
        norm: Of the gradient of the mean loss.
        clock: Where the time went.
        began: When, by time.perf_counter().
        bytes_sent: By this rank.
    """

    step: int
    totals: Totals
    norm: float
    clock: Clock
    began: float
    bytes_sent: int


class TrainStep:
    """The model, its optimizer, and the step that changes both. Collective to build.

    Args:
        model: In its initial state; rank 0's is everybody's.
        config: The settings, resolved.
        comm: The dp axis.
    """

    def __init__(self, model: Transformer, config: Config, comm: Communicator):
        self.model = model
        self.grids = Grids(config.train.num_microbatches) if config.train.reproducible else None
        self.replicas = DataParallel(model, comm, bucket_bytes=int(config.comm.bucket_mib * 2**20), grids=self.grids)
        if self.grids is not None and model.head is None:
            model.as_head = self.replicas.separate_use("embedding.weight")
        self.optimizer = build_optimizer(model, config.train)
        self.skipped_in_a_row = 0
        self.tokens_seen = 0
        self._memory = PeakMemory()
        self._config = config
        self._comm = comm
        self._loss = torch.compile(model.loss) if config.train.compile else model.loss
        if not config.train.compile:  # which would cut the model in two at each hook
            for layer in model.layers:
                layer.register_forward_pre_hook(self._look_for_deaths)

    def compute(self, step: int, source: MicrobatchSource, *, stop: bool) -> Computed:
        """Computes and reduces the gradients of the step that follows `step` finished ones. Collective.

        The weights, and all else that is kept from step to step, stay as they are: it can be done again, when `fits`
        has refused it, or behind `move_to`.

        Args:
            step: Steps finished so far.
            source: Gives this rank's microbatches of a step.
            stop: Whether this rank was asked to stop.

        Raises:
            DataError: A rank could not read its data; on that rank. On the others a PeerError.
        """
        began = time.perf_counter()
        bytes_before = self._comm.bytes_sent
        clock = Clock()
        mine = Totals.none(self._config.train.num_microbatches, self._comm.size, stop=stop)
        failure: DataError | None = None
        try:
            self._accumulate(step, source.microbatches(step), mine, clock)
        except DataError as error:
            # The others are about to wait for this rank's gradients. It gives what it has, and the flag that rides with
            # the scalars brings everybody to the agreement below.
            failure, mine.failed = error, True
        mine.memory_bytes = self._memory.bytes
        with clock.part("comm"):
            totals = mine.unpack(self.replicas.reduce(mine.pack()))
            if totals.failed:
                with agreement(self._comm):
                    if failure is not None:
                        raise failure
            norm = self.replicas.gradient_norm() / totals.num_divided
        bytes_sent = self._comm.bytes_sent - bytes_before
        return Computed(step, totals, norm, clock, began, bytes_sent)

    def fits(self) -> bool:
        """Whether no microbatch's gradient was too large for its grid; else the grids are coarser now, for another try.

        The same on all ranks.
        """
        if self.grids is None or not self.grids.overflowed(self.replicas.largest):
            return True
        self.grids.move_on(self.replicas.largest)
        self.replicas.start_over()
        return False

    def apply(self, computed: Computed) -> StepMetrics:
        """Updates the weights. Nothing is communicated: what all ranks have computed, all apply."""
        totals, norm, clock = computed.totals, computed.norm, computed.clock
        loss = totals.loss_sum / totals.num_divided
        lr = learning_rate(self._config.train, computed.step)
        finite = math.isfinite(loss) and math.isfinite(norm)
        with clock.part("compute"):
            if finite:
                self._update(norm, totals.num_divided, lr)
                if self.grids is not None:
                    self.grids.move_on(self.replicas.largest)
            self.optimizer.zero_grad(set_to_none=True)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.tokens_seen += totals.num_tokens
        step_s = time.perf_counter() - computed.began
        return StepMetrics(
            step=computed.step + 1,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            tokens=self.tokens_seen,
            tokens_per_s=totals.num_tokens / step_s,
            step_s=step_s,
            compute_s=clock.seconds["compute"],
            comm_s=clock.seconds["comm"],
            data_s=clock.seconds["data"],
            bytes_sent=computed.bytes_sent,
            ranks=self._comm.size,
            rank_s=[round(s / n, 5) if n else None for s, n in zip(totals.seconds, totals.counts, strict=True)],
            peak_memory_bytes=totals.memory_bytes,
            skipped=not finite,
            faults=totals.describe_faults(),
        )

    def move_to(self, comm: Communicator) -> None:
        """Collective: goes on with the ranks that are left."""
        self._comm = comm
        self.replicas.move_to(comm)

    def digest(self) -> str:
        """Of all weights and optimizer state."""
        return checkpoint.digest(checkpoint.capture(self.model, self.optimizer))

    def fingerprint(self, sequences: Sequences) -> str:
        """Of the gradients of one microbatch, as this rank computes them. Between steps; leaves no gradients."""
        self.replicas.start_over()
        begin_microbatch(self.model, self._config.train.seed, 0, 0)
        with self._precision():
            loss, _ = self._loss(*sequences)
        loss.backward()
        gradients = {name: gradient.clone() for name, gradient in self.replicas.local_gradients()}
        self.replicas.start_over()
        return checkpoint.digest({"loss": loss.detach(), **gradients})

    def evaluate(self, microbatches: Sequence[tuple[int, Sequences]], mine: Totals) -> None:
        """Adds to `mine` this rank's losses over validation sequences, and their number of tokens."""
        self.model.eval()
        with torch.no_grad(), self._precision():
            for index, sequences in microbatches:
                self._comm.progress.pulse.beat()
                loss, count = self._loss(*sequences)
                mine.losses[index] = loss.item()
                mine.num_tokens += count
        self.model.train()

    def _accumulate(self, step: int, microbatches: Iterator[Microbatch], mine: Totals, clock: Clock) -> None:
        """Adds the gradients of the microbatches up, and their losses in `mine`."""
        rank = self._comm.rank
        while True:
            with clock.part("data"):
                microbatch = next(microbatches, None)
            if microbatch is None:
                break
            is_first = mine.counts[rank] == 0
            with clock.part("compute"):
                self._add(step, microbatch, mine, sample_memory=is_first and step % self._config.run.log_every == 0)
            mine.counts[rank] += 1
        mine.seconds[rank] = clock.seconds["compute"]

    def _add(self, step: int, microbatch: Microbatch, mine: Totals, *, sample_memory: bool) -> None:
        """Adds the gradient and the loss of one microbatch."""
        self._comm.progress.pulse.beat()
        self._look_for_deaths()
        begin_microbatch(self.model, self._config.train.seed, step, microbatch.index)
        with self._precision():
            loss, count = self._loss(*microbatch.sequences)
        if sample_memory:  # all activations are there
            self._memory.sample()
        with self.replicas.final_backward() if microbatch.is_last else nullcontext():
            loss.backward()
        index = microbatch.index
        mine.losses[index] = loss.item()
        mine.owners[index] = self._comm.rank
        mine.faults[index] = self.replicas.take_fault() or not math.isfinite(mine.losses[index])
        mine.num_tokens += count

    def _look_for_deaths(self, *_: object) -> None:
        """In the middle of forward: in backward the replicas do."""
        self._comm.progress.look_for_deaths()

    def _update(self, norm: float, num_divided: int, lr: float) -> None:
        """Divides the summed gradients by the token count, clips their norm, and applies them."""
        limit = self._config.train.clip_norm
        clip = limit / norm if 0 < limit < norm else 1.0
        self.replicas.scale_gradients(clip / num_divided)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def _precision(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._config.train.precision == "bf16")


class MicrobatchSource(Protocol):
    """What a step takes its data from."""

    def microbatches(self, step: int) -> Iterator[Microbatch]:
        """This rank's microbatches of a step."""
        ...
