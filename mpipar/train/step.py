"""One step of training: microbatches to gradients, gradients to a new model.

    this rank's microbatches    forward, backward; gradients add up, and are reduced during the last backward
    reduce                      gradients, loss and token count become those of the whole step, on every rank
    update                      divided by the token count, clipped, applied; every rank comes to the same weights

The loss is a sum over tokens, divided once, here, by the number of tokens in the step. Who computed which microbatch
does not enter.

A GPU is asked for microbatch after microbatch, and waited for once, behind the last (`readings`). What its clock parts
tell is where the host was: computing is asking and that wait, in which all that has been asked for ends, but for the
update, which runs while the host begins the next step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mpipar import checkpoint
from mpipar.comm import Communicator, agreement
from mpipar.data import Microbatch, Sequences
from mpipar.errors import DataError
from mpipar.model import Transformer, begin_microbatch
from mpipar.parallel import DataParallel, Grids
from mpipar.train.config import Config
from mpipar.train.device import Placement
from mpipar.train.loss_scale import LossScale, unscale_before_rounding
from mpipar.train.metrics import Clock, PeakMemory, StepMetrics, Totals
from mpipar.train.optimizer import build_optimizer, learning_rate
from mpipar.train.peak import peak_of_all
from mpipar.train.readings import Readings

_ON_CPU = Placement()
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


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
        model: In its initial state, on the device of this rank; rank 0's is everybody's.
        config: The settings, resolved.
        comm: The dp axis.
        placement: Where its ranks compute.

    Attributes:
        scale: Of the loss; None where gradients are not in float16.
        skipped_in_a_row: Steps whose loss or gradient was not finite, and not because of the scale.
        tokens_seen: In the whole run.
        peak_flops: What the GPUs of all ranks can do at best, in operations a second; None if that is not known.
    """

    def __init__(self, model: Transformer, config: Config, comm: Communicator, placement: Placement = _ON_CPU):
        self.model = model
        train = config.train
        self.scale = LossScale(train.microbatch * train.seq_len) if train.precision == "fp16" else None
        self.grids = Grids(config.train.num_microbatches) if config.train.reproducible else None
        self.replicas = DataParallel(model, comm, bucket_bytes=int(config.comm.bucket_mib * 2**20), grids=self.grids)
        if self.grids is not None and model.head is None:
            model.as_head = self.replicas.separate_use("embedding.weight")
        if self.grids is not None and self.scale is not None:
            unscale_before_rounding(model, self.scale)
        self.optimizer = build_optimizer(model, config.train)
        self.skipped_in_a_row = 0
        self.tokens_seen = 0
        self._device = next(model.parameters()).device
        self._memory = PeakMemory(self._device)
        self._config = config
        self._comm = comm
        self._placement = placement
        self._flops = model.flops_per_token(train.seq_len) * train.global_batch * train.seq_len  # of a step
        self.peak_flops = self._sum_peaks()
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
            norm = self.replicas.gradient_norm() / self._gradients_are_times(totals)
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
                self._update(norm, self._gradients_are_times(totals), lr)
                if self.grids is not None:
                    self.grids.move_on(self.replicas.largest)
            self.optimizer.zero_grad(set_to_none=True)
        scale = None if self.scale is None else self.scale.factor
        self._count_skipped(finite)
        self.tokens_seen += totals.num_tokens
        step_s = time.perf_counter() - computed.began
        return StepMetrics(
            step=computed.step + 1,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            tokens=self.tokens_seen,
            tokens_per_s=totals.num_tokens / step_s,
            mfu=None if self.peak_flops is None else self._flops / step_s / self.peak_flops,
            loss_scale=scale,
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
        self.peak_flops = self._sum_peaks()
        self.replicas.move_to(comm)

    def digest(self) -> str:
        """Of all weights and optimizer state."""
        self._comm.catch_up(self._device)
        return checkpoint.digest(checkpoint.capture(self.model, self.optimizer))

    def fingerprint(self, sequences: Sequences) -> str:
        """Of the gradients of one microbatch, as this rank computes them. Between steps; leaves no gradients."""
        self.replicas.start_over()
        begin_microbatch(self.model, self._config.train.seed, 0, 0)
        with self._precision():
            loss, _ = self._loss(*sequences)
        self._scaled(loss).backward()
        gradients = {name: gradient.clone() for name, gradient in self.replicas.local_gradients()}
        self.replicas.start_over()
        self._comm.catch_up(self._device)
        return checkpoint.digest({"loss": loss.detach(), **gradients})

    def evaluate(self, microbatches: Sequence[tuple[int, Sequences]], mine: Totals) -> None:
        """Adds to `mine` this rank's losses over validation sequences, and their number of tokens."""
        readings = Readings()
        self.model.eval()
        with torch.no_grad(), self._precision():
            for index, sequences in microbatches:
                self._comm.progress.pulse.beat()
                readings.add(index, *self._loss(*sequences))
        self._comm.catch_up(self._device)
        readings.read_into(mine, self._comm.rank)
        self.model.train()

    def _accumulate(self, step: int, microbatches: Iterator[Microbatch], mine: Totals, clock: Clock) -> None:
        """Adds the gradients of the microbatches up, and their losses in `mine`."""
        rank, readings = self._comm.rank, Readings()
        while True:
            with clock.part("data"):
                microbatch = next(microbatches, None)
            if microbatch is None:
                break
            is_first = mine.counts[rank] == 0
            with clock.part("compute"):
                self._add(step, microbatch, readings, sample_memory=is_first and step % self._config.run.log_every == 0)
            mine.counts[rank] += 1
        with clock.part("compute"):
            self._comm.catch_up(self._device)
            readings.read_into(mine, rank)
        mine.seconds[rank] = clock.seconds["compute"]

    def _add(self, step: int, microbatch: Microbatch, readings: Readings, *, sample_memory: bool) -> None:
        """Adds the gradient and the loss of one microbatch."""
        self._comm.progress.pulse.beat()
        self._look_for_deaths()
        begin_microbatch(self.model, self._config.train.seed, step, microbatch.index)
        with self._precision():
            loss, count = self._loss(*microbatch.sequences)
        if sample_memory:  # all activations are there
            self._memory.sample()
        with self.replicas.final_backward() if microbatch.is_last else nullcontext():
            self._scaled(loss).backward()
        readings.add(microbatch.index, loss, count, fault=self.replicas.take_fault())

    def _look_for_deaths(self, *_: object) -> None:
        """In the middle of forward: in backward the replicas do."""
        self._comm.progress.look_for_deaths()

    def _update(self, norm: float, times: float, lr: float) -> None:
        """Divides the summed gradients by what they are too large by, clips their norm, and applies them."""
        limit = self._config.train.clip_norm
        clip = limit / norm if 0 < limit < norm else 1.0
        self.replicas.scale_gradients(clip / times)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def _precision(self) -> torch.autocast:
        half = _HALF.get(self._config.train.precision)
        return torch.autocast(self._device.type, dtype=half or torch.bfloat16, enabled=half is not None)

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.scale is None else loss * self.scale.factor

    def _gradients_are_times(self, totals: Totals) -> float:
        """How many times the gradient of the mean loss the reduced gradients are."""
        if self.scale is None or self.grids is not None:  # which have seen them without the scale
            return totals.num_divided
        return totals.num_divided * self.scale.factor

    def _count_skipped(self, finite: bool) -> None:
        """Moves the scale on. As long as it falls, a step that was skipped says nothing of the model."""
        if finite:
            self.skipped_in_a_row = 0
        elif self.scale is None or not self.scale.can_fall:
            self.skipped_in_a_row += 1
        if self.scale is not None:
            self.scale.move_on(finite=finite)

    def _sum_peaks(self) -> float | None:
        """What the GPUs of the ranks can do at best, in operations a second; None if that is not known."""
        if not self._placement.on_gpus:
            return None
        return peak_of_all(self._placement.gpus_of(self._comm.roster.origins), self._config.train.precision)


class MicrobatchSource(Protocol):
    """What a step takes its data from."""

    def microbatches(self, step: int) -> Iterator[Microbatch]:
        """This rank's microbatches of a step."""
        ...
