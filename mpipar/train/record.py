"""What a run leaves and shows of its steps: metrics.jsonl, TensorBoard, the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpipar.train.metrics import StepMetrics
from mpipar.train.metrics_file import Metrics
from mpipar.train.run_folder import RunFolder
from mpipar.train.terminal import Terminal


class Record:
    """Kept by the rank that leads; on other ranks it only remembers what they would have to write if that one died.

    Args:
        folder: The run folder.
        terminal: Where steps are shown.
        tensorboard: Whether TensorBoard events are wanted.

    Attributes:
        val_loss: Of the last evaluation.
    """

    def __init__(self, folder: RunFolder, terminal: Terminal, *, tensorboard: bool):
        self.val_loss = math.nan
        self._folder = folder
        self._terminal = terminal
        self._tensorboard = tensorboard
        self._metrics: Metrics | None = None
        self._board: TensorBoard | None = None
        self._latest: list[dict[str, Any]] = []  # the lines of the last step

    def keep(self, done: int) -> None:
        """From now on this rank keeps it.

        Args:
            done: Steps that are finished. What was recorded of later ones, by a run that was stopped behind its last
                checkpoint, is taken back; what a rank that died did not come to write of the last one, is written.
        """
        self._metrics = Metrics(self._folder.metrics, after_step=done)
        for line in self._latest:
            self._metrics.write(line)
        self._board = _open_board(self._folder.tensorboard, done) if self._tensorboard else None

    def step(self, measured: StepMetrics) -> None:
        """Records a step."""
        self._latest = [measured.to_json()]
        if self._metrics is not None:
            self._metrics.write(self._latest[0])
        if self._board is not None:
            self._board.step(measured)
        self._terminal.step(measured)

    def evaluation(
        self, step: int, tokens: int, val_loss: float, val_losses: Mapping[str, float], entropy: float
    ) -> None:
        """Records an evaluation after a step, up to which the run has seen so many tokens.

        Args:
            step: Finished steps.
            tokens: Seen in them.
            val_loss: Of the mixture, in nats a token.
            val_losses: By folder, of each data set alone; empty where there is one.
            entropy: Of the frequencies of tokens.
        """
        self.val_loss = val_loss
        each = {"val_losses": dict(val_losses)} if val_losses else {}
        self._latest.append({"step": step, "tokens": tokens, "val_loss": val_loss, **each})
        if self._metrics is not None:
            self._metrics.write(self._latest[-1])
        if self._board is not None:
            self._board.evaluation(step, val_loss, val_losses)
        self._terminal.evaluation(step, val_loss, val_losses, entropy)

    def sync(self) -> None:
        """Makes the metrics survive a loss of power: before a checkpoint says that their steps have happened."""
        if self._metrics is not None:
            self._metrics.sync()

    def close(self) -> None:
        """Closes the files, and takes the progress line away."""
        self._terminal.end()
        if self._metrics is not None:
            self._metrics.close()
        if self._board is not None:
            self._board.close()


class TensorBoard:
    """The run's events."""

    def __init__(self, folder: Path, done: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=done + 1)

    def step(self, m: StepMetrics) -> None:
        for name in ("loss", "lr", "grad_norm", "tokens_per_s", "comm_s"):
            self._writer.add_scalar(f"train/{name}", getattr(m, name), m.step)

    def evaluation(self, step: int, val_loss: float, val_losses: Mapping[str, float]) -> None:
        self._writer.add_scalar("val/loss", val_loss, step)
        for folder, loss in val_losses.items():
            self._writer.add_scalar(f"val/loss of {folder}", loss, step)

    def close(self) -> None:
        self._writer.close()


def _open_board(folder: Path, done: int) -> TensorBoard | None:
    """The events, where tensorboard is installed."""
    try:
        return TensorBoard(folder, done)
    except ImportError:
        return None
