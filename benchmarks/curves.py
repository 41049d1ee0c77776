"""The losses of several runs over each other, and how far each is from the first:

    python -m benchmarks.curves runs/one runs/two runs/eight --labels "1 rank" "2 ranks" "8 ranks" --out docs/exact.png

What is drawn earlier is drawn wider, so that lines which lie on each other can all be seen. Where the number of ranks
of a run changed it is written beside the line, if metrics.jsonl knows it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.command import run_command
from benchmarks.plot import COLORS, check_plot
from mpipar.command_line import parse
from mpipar.errors import ConfigError
from mpipar.storage import atomic_file
from mpipar.train.metrics_file import read_metrics
from mpipar.train.run_folder import RunFolder

_WIDEST, _NARROWEST = 9.0, 1.2  # points


@dataclass(frozen=True)
class Curve:
    """The losses of a run.

    Args:
        label: What the run is called.
        losses: By step.
        ranks: By step, where it is known.
    """

    label: str
    losses: dict[int, float]
    ranks: dict[int, int]

    @property
    def changes(self) -> list[tuple[int, int, int]]:
        """(step, ranks before, ranks from then on)."""
        known = sorted(self.ranks.items())
        return [(step, before, now) for (_, before), (step, now) in pairwise(known) if before != now]

    def distance(self, other: Curve) -> dict[int, float]:
        """Between the losses, by step, for the steps that both have."""
        steps = sorted(self.losses.keys() & other.losses.keys())
        return {step: abs(self.losses[step] - other.losses[step]) for step in steps}


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Draws the losses of several runs, and how far each is from the first."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders; the first is what the others are compared with."""
    labels: tuple[str, ...] = ()
    """What the runs are called; their folders' names if empty."""
    title: str = ""
    """Above the picture."""
    out: Annotated[Path, tyro.conf.arg(metavar="PNG")] = Path("curves.png")
    """The picture."""

    def run(self) -> None:
        """Draws, and prints how far each run is from the first.

        Raises:
            ConfigError: There is nothing to draw, or nothing to draw it with.
        """
        check_plot(self.out, "--out")
        if not self.runs:
            raise ConfigError("no runs: python -m benchmarks.curves runs/first runs/second")
        if self.labels and len(self.labels) != len(self.runs):
            raise ConfigError(f"--labels has {len(self.labels)} labels for {len(self.runs)} runs")
        labels = self.labels or [folder.name for folder in self.runs]
        curves = [read(folder, label) for folder, label in zip(self.runs, labels, strict=True)]
        for curve in curves[1:]:
            print(f"{curve.label}: {verdict(curve, curves[0])}")
        draw(curves, self.out, self.title)
        print(f"plot    {self.out}")


def read(folder: Path, label: str) -> Curve:
    """The losses of a run.

    Raises:
        ConfigError: There are none.
    """
    lines = [line for line in read_metrics(RunFolder(folder).metrics) if line.get("loss") is not None]
    if not lines:
        raise ConfigError(f"{folder} holds no metrics.jsonl with steps: give the folders of runs")
    ranks = {line["step"]: line["ranks"] for line in lines if "ranks" in line}
    return Curve(label, {line["step"]: line["loss"] for line in lines}, ranks)


def verdict(curve: Curve, first: Curve) -> str:
    """How far a run is from the first."""
    distance = curve.distance(first)
    differing = sum(value > 0 for value in distance.values())
    if not differing:
        return f"the loss of {first.label} at all {len(distance)} steps"
    return f"differs at {differing} of {len(distance)} steps, by up to {max(distance.values()):.2g}"


def draw(curves: Sequence[Curve], path: Path, title: str) -> None:
    """Draws the curves into a PNG, and below them their distance from the first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(
        2, 1, figsize=(9, 6.5), dpi=120, layout="constrained", sharex=True, height_ratios=[5, 3]
    )
    step = (_WIDEST - _NARROWEST) / max(1, len(curves) - 1)
    for number, curve in enumerate(curves):
        color, width = COLORS[number % len(COLORS)], _WIDEST - number * step
        upper.plot(*_points(curve.losses), label=curve.label, color=color, linewidth=width)
        _mark_changes(upper, curve, color, height=24 + 13 * number)
        if number > 0:
            lower.plot(*_points(curve.distance(curves[0])), color=color, linewidth=width)
    upper.set_ylabel("loss, nats a token")
    upper.legend(frameon=False, handlelength=3.5, labelspacing=0.8)
    lower.set_ylabel(f"distance from {curves[0].label}")
    lower.set_xlabel("step")
    _scale(lower, [value for curve in curves[1:] for value in curve.distance(curves[0]).values()])
    _label_zero(lower, [curve.label for curve in curves[1:] if not any(curve.distance(curves[0]).values())])
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
        axes.margins(x=0.01)
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=11)
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png")
    pyplot.close(figure)


def _points(values: dict[int, float]) -> tuple[list[int], list[float]]:
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def _mark_changes(axes: Any, curve: Curve, color: str, height: float) -> None:
    """Writes so many points above the line where the number of ranks changed, and to what."""
    for step, before, now in curve.changes:
        axes.annotate(
            f"{before} → {now} ranks",
            (step, curve.losses[step]),
            xytext=(0, height),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=color,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.8, "shrinkB": 0},
        )


def _label_zero(axes: Any, labels: Sequence[str]) -> None:
    """Says above the zero line whose line that is."""
    if labels:
        *others, last = labels
        names = f"{', '.join(others)} and {last}" if others else last
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate(f"{names}: zero at every step", (0.99, 0), xytext=(0, 7), ha="right", fontsize=9, **place)


def _scale(axes: Any, distances: Sequence[float]) -> None:
    """Powers of ten, and zero below them: a distance of nothing is to be seen too."""
    positive = [value for value in distances if value > 0]
    if not positive:
        axes.set_ylim(-1, 1)
        axes.set_yticks([0], ["0"])
        return
    axes.set_yscale("symlog", linthresh=min(positive), linscale=0.6)
    axes.set_ylim(-0.25 * min(positive), 3 * max(positive))


if __name__ == "__main__":
    sys.exit(run_command(lambda: parse(Curves, "python -m benchmarks.curves").run()))
