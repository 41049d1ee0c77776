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
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mpipar.comm import Communicator, agreement
from mpipar.errors import DataError
from mpipar.model import Transformer
from mpipar.parallel import DataParallel
from mpipar.train.config import Config
from mpipar.train.metrics import Clock, PeakMemory, StepMetrics, Totals
from mpipar.train.optimizer import build_optimizer, learning_rate


class TrainStep:
    """The model, its optimizer, and the step that changes both. Collective to build and to call.

    Args:
        model: In its initial state; rank 0's is everybody's.
        config: The settings, resolved.
        comm: The dp axis.
    """

    def __init__(self, model: Transformer, config: Config, comm: Communicator):
        self.model = model
        self.replicas = DataParallel(model, comm, bucket_bytes=int(config.comm.bucket_mib * 2**20))
        self.optimizer = build_optimizer(model, config.train)
        self.skipped_in_a_row = 0
        self.tokens_seen = 0
        self._memory = PeakMemory()
        self._config = config
        self._comm = comm
        self._loss = torch.compile(model.loss) if config.train.compile else model.loss

    def __call__(self, step: int, source: MicrobatchSource, *, stop: bool) -> tuple[StepMetrics, bool]:
        """Runs the step that follows `step` finished ones.

        Args:
            step: Steps finished so far.
            source: Gives this rank's microbatches of a step.
            stop: Whether this rank was asked to stop.

        Returns:
            What was measured, and whether any rank was asked to stop.

        Raises:
            DataError: A rank could not read its data; on that rank. On the others a PeerError.
        """
        began = time.perf_counter()
        bytes_before = self._comm.bytes_sent
        clock = Clock()
        mine = Totals(stop=stop)
        failure: DataError | None = None
        with clock.part("data"):
            try:
                microbatches = source.microbatches(step)
            except DataError as error:
                # The others are about to wait for this rank's gradients. It gives none, and the flag that rides with
                # the scalars brings everybody to the agreement below.
                microbatches, failure, mine.failed = [], error, True
        with clock.part("compute"):
            self._accumulate(microbatches, mine, sample_memory=step % self._config.run.log_every == 0)
        mine.memory_bytes = self._memory.bytes
        with clock.part("comm"):
            totals = Totals.unpack(self.replicas.reduce(mine.pack()))
            norm = self.replicas.gradient_norm() / max(1, totals.num_tokens)
        if totals.failed:
            with agreement(self._comm):
                if failure is not None:
                    raise failure
        loss = totals.loss_sum / totals.num_tokens
        lr = learning_rate(self._config.train, step)
        finite = math.isfinite(loss) and math.isfinite(norm)
        with clock.part("compute"):
            if finite:
                self._update(norm, totals.num_tokens, lr)
            self.optimizer.zero_grad(set_to_none=True)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.tokens_seen += totals.num_tokens
        step_s = time.perf_counter() - began
        metrics = StepMetrics(
            step=step + 1,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            tokens=self.tokens_seen,
            tokens_per_s=totals.num_tokens / step_s,
            step_s=step_s,
            compute_s=clock.seconds["compute"],
            comm_s=clock.seconds["comm"],
            data_s=clock.seconds["data"],
            bytes_sent=self._comm.bytes_sent - bytes_before,
            peak_memory_bytes=totals.memory_bytes,
            skipped=not finite,
        )
        return metrics, totals.stop

    def evaluate(self, microbatches: Sequence[Tensor]) -> tuple[float, int]:
        """This rank's sum of losses over validation sequences, and their number of tokens.

        Args:
            microbatches: Each [B, T + 1].
        """
        loss_sum, num_tokens = 0.0, 0
        with torch.no_grad(), self._precision():
            for tokens in microbatches:
                loss, count = self._loss(tokens)
                loss_sum += loss.item()
                num_tokens += count
        return loss_sum, num_tokens

    def _accumulate(self, microbatches: Sequence[Tensor], mine: Totals, *, sample_memory: bool) -> None:
        """Adds the gradients of the microbatches up, and their losses in `mine`."""
        for i, tokens in enumerate(microbatches):
            with self._precision():
                loss, count = self._loss(tokens)
            if i == 0 and sample_memory:  # all activations are there
                self._memory.sample()
            with self.replicas.final_backward() if i == len(microbatches) - 1 else nullcontext():
                loss.backward()
            mine.loss_sum += loss.item()
            mine.num_tokens += count

    def _update(self, norm: float, num_tokens: int, lr: float) -> None:
        """Divides the summed gradients by the token count, clips their norm, and applies them."""
        limit = self._config.train.clip_norm
        clip = limit / norm if 0 < limit < norm else 1.0
        self.replicas.scale_gradients(clip / num_tokens)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def _precision(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._config.train.precision == "bf16")


class MicrobatchSource(Protocol):
    """What a step takes its data from."""

    def microbatches(self, step: int) -> list[Tensor]:
        """This rank's microbatches of a step, each [B, T + 1]."""
        ...


def bf16_is_fast() -> bool:
    """Whether this processor multiplies bfloat16 matrices in hardware; without it autocast is a loss."""
    try:
        flags = Path("/proc/cpuinfo").read_text("ascii", errors="replace").split()
    except OSError:
        return False
    return not {"amx_bf16", "avx512_bf16", "bf16"}.isdisjoint(flags)
