"""What a run leaves and shows of its steps: metrics.jsonl, TensorBoard, the terminal."""

from __future__ import annotations

from pathlib import Path

from mpipar.train.metrics import StepMetrics
from mpipar.train.run_folder import Metrics, RunFolder
from mpipar.train.terminal import Terminal


class Record:
    """Kept by rank 0; on other ranks every method does nothing.

    Args:
        folder: The run folder.
        terminal: Where steps are shown.
        done: Steps that are finished. What was recorded of later ones, by a run that was stopped behind its last
            checkpoint, is taken back.
        keeps: Whether this is the rank that keeps it.
        tensorboard: Whether TensorBoard events are wanted.
    """

    def __init__(self, folder: RunFolder, terminal: Terminal, *, done: int, keeps: bool, tensorboard: bool):
        self._terminal = terminal
        self._metrics = Metrics(folder.metrics, after_step=done) if keeps else None
        self._board = _open_board(folder.tensorboard, done) if keeps and tensorboard else None

    def step(self, measured: StepMetrics) -> None:
        """Records a step."""
        if self._metrics is not None:
            self._metrics.write(measured.to_json())
        if self._board is not None:
            self._board.step(measured)
        self._terminal.step(measured)

    def evaluation(self, step: int, tokens: int, val_loss: float) -> None:
        """Records an evaluation after a step, up to which the run has seen so many tokens."""
        if self._metrics is not None:
            self._metrics.write({"step": step, "tokens": tokens, "val_loss": val_loss})
        if self._board is not None:
            self._board.evaluation(step, val_loss)

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

    def evaluation(self, step: int, val_loss: float) -> None:
        self._writer.add_scalar("val/loss", val_loss, step)

    def close(self) -> None:
        self._writer.close()


def _open_board(folder: Path, done: int) -> TensorBoard | None:
    """The events, where tensorboard is installed."""
    try:
        return TensorBoard(folder, done)
    except ImportError:
        return None
