"""What a run shows while it goes: lines that a batch log can hold, and a progress line for a person who watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TextIO

from tqdm import tqdm

from mpipar.comm import terminal_device
from mpipar.train.metrics import StepMetrics


class Terminal:
    """The output of the rank that leads; on other ranks every method does nothing.

    Args:
        speaks: Whether this is the rank that shows the run.
        log_every: Steps between two lines.
    """

    def __init__(self, *, speaks: bool, log_every: int):
        self._log_every = log_every
        self._bar: tqdm[None] | None = None
        self._steps = self._first = 0
        self._look(speaks)

    def _look(self, speaks: bool) -> None:
        device = terminal_device() if speaks else None
        self._speaks = speaks
        self._stream: TextIO = open(device, "w", encoding="utf-8") if device else sys.stdout  # noqa: SIM115
        self._is_watched = device is not None

    def take_over(self, done: int) -> None:
        """From now on this rank shows the run, of which so many steps are finished."""
        self._look(speaks=True)
        self.begin(self._steps, done)

    def begin(self, steps: int, done: int) -> None:
        """Starts the clock, and the progress line.

        Args:
            steps: Steps of the whole run.
            done: Steps that are behind it already.
        """
        self._steps, self._first = steps, done
        if self._is_watched and done < steps:
            self._bar = tqdm(total=steps, initial=done, unit="step", file=self._stream, dynamic_ncols=True, leave=False)

    def say(self, line: str) -> None:
        """Prints a line."""
        if not self._speaks:
            return
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def step(self, metrics: StepMetrics) -> None:
        """Moves the progress line, and prints a line at intervals and for a step that was skipped."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {metrics.loss:.3f}", refresh=False)
            self._bar.update(1)
        if metrics.skipped:
            scale = "" if metrics.loss_scale is None else f" (loss scale {metrics.loss_scale:g})"
            self.say(
                f"step {metrics.step:>6}/{self._steps}  skipped: not finite: {metrics.faults or 'the norm'}{scale}"
            )
        elif metrics.step % self._log_every == 0 or metrics.step in (self._first + 1, self._steps):
            self.say(self._line(metrics))

    def evaluation(self, step: int, val_loss: float, val_losses: Mapping[str, float], entropy: float) -> None:
        """Prints the result of an evaluation beside what a model that knew only token frequencies would reach.

        Under it stand those of each data set alone, by its folder, where several are mixed.
        """
        relation = f"{val_loss / entropy:.2f} x unigram entropy {entropy:.3f}"
        self.say(f"step {step:>6}/{self._steps}  val_loss {val_loss:.4f} = {relation}")
        for folder, loss in val_losses.items():
            self.say(f"step {step:>6}/{self._steps}  val_loss {loss:.4f} of {folder}")

    def end(self) -> None:
        """Takes the progress line away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _line(self, m: StepMetrics) -> str:
        if m.step == self._first + 1:  # which pays for what every first time costs
            self._first_ended = time.monotonic()
            remaining_s = m.step_s * (self._steps - m.step)
        else:
            pace_s = (time.monotonic() - self._first_ended) / (m.step - self._first - 1)
            remaining_s = pace_s * (self._steps - m.step)
        mfu = "" if m.mfu is None else f"mfu {m.mfu:5.1%}  "
        return (
            f"step {m.step:>6}/{self._steps}  loss {m.loss:7.4f}  norm {m.grad_norm:6.2f}  lr {m.lr:.2e}  "
            f"{m.tokens_per_s:8,.0f} tokens/s  {mfu}comm {m.comm_s / m.step_s:4.0%}  {duration(remaining_s)} left"
        )


def duration(seconds: float) -> str:
    """1:05 or 2:03:04."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"
