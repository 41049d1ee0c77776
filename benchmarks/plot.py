"""The picture of a table: algbw and busbw over size."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.formats import LIMIT, Report
from mpipar.errors import ConfigError
from mpipar.storage import atomic_file

COLORS = ("#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#E69F00", "#000000")
"""Okabe & Ito's palette, which people see alike whose colours differ."""
_LABEL_GAP = 0.055  # of a panel's height, between labels


def check_plot(path: Path, flag: str = "--plot") -> None:
    """Refuses, before anything is measured, a picture that could not be drawn.

    Args:
        path: Where it is to be.
        flag: The option that said so.

    Raises:
        ConfigError: matplotlib is missing, or the folder.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError(f"{flag} needs matplotlib, which is not installed: pip install 'mpipar[plots]'")
    if path.suffix != ".png":
        raise ConfigError(f"{flag} {path}: the name of a picture ends in .png")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{flag} {path}: there is no folder {path.absolute().parent}")


def draw(report: Report, path: Path) -> None:
    """Draws a line for each contestant into a PNG, and the limit as a dashed one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    env = report.environment
    hosts = "1 host" if env.hosts == 1 else f"{env.hosts} hosts"
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5), dpi=120, layout="constrained", sharey=True)
    for axes, bandwidth in zip(panels, ("algbw", "busbw"), strict=True):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        for number, name in enumerate(report.titles):
            rows = report.of(name)
            speeds = [row.algbw if bandwidth == "algbw" else row.busbw for row in rows]
            limit = name == LIMIT
            color = "0.45" if limit else COLORS[number % len(COLORS)]
            style = {"linestyle": "--"} if limit else {"marker": "o", "markersize": 3.5}
            axes.plot([row.size for row in rows], speeds, color=color, linewidth=1.6, label=name, **style)
        axes.set_title(f"{bandwidth}, GB/s", loc="left", fontsize=10)
        axes.set_xlabel("array on each rank, bytes")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xticks(sizes := sorted({row.size for row in report.rows}), [_short(size) for size in sizes])
        axes.minorticks_off()
        axes.tick_params(axis="x", labelsize=8)
    figure.canvas.draw()  # only now is it known where a line ends
    for axes in panels:
        _label_lines(axes)
    figure.suptitle(
        f"{report.question}, {report.dtype}, {env.ranks} ranks on {hosts}: {env.mpi}, {env.processor}", fontsize=11
    )
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png")
    pyplot.close(figure)


def _label_lines(axes: Any) -> None:
    """Writes each line's name beside its right end, in its colour; names that would overlap are moved apart."""
    lines = sorted(axes.get_lines(), key=lambda line: float(line.get_ydata()[-1]))
    heights = [float(_on_axes(axes, line.get_xdata()[-1], line.get_ydata()[-1])[1]) for line in lines]
    for _ in range(100):
        for lower in range(len(heights) - 1):
            overlap = _LABEL_GAP - (heights[lower + 1] - heights[lower])
            if overlap > 0:
                heights[lower] -= overlap / 2
                heights[lower + 1] += overlap / 2
    for height, line in zip(heights, lines, strict=True):
        axes.text(1.01, height, line.get_label(), transform=axes.transAxes, color=line.get_color(), va="center")


def _on_axes(axes: Any, x: float, y: float) -> Any:
    """Where a point of the data is, as fractions of the panel."""
    return axes.transAxes.inverted().transform(axes.transData.transform((x, y)))


def _short(size: int) -> str:
    """Bytes, as 4K or 64M."""
    for unit, letter in ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")):
        if size >= unit:
            return f"{size / unit:.3g}{letter}"
    return str(size)
