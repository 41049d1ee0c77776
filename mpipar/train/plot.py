"""loss.png: the picture of a run."""

from __future__ import annotations

from pathlib import Path

from mpipar.storage import atomic_file
from mpipar.train.metrics_file import read_metrics
from mpipar.train.run_folder import writing


def plot_loss(metrics: Path, picture: Path, *, entropy: float, title: str) -> str:
    """Draws training and validation loss over the tokens seen. Returns where it is, or why it is not.

    Args:
        metrics: A metrics.jsonl.
        picture: The PNG to write.
        entropy: Of the corpus's token frequencies, in nats a token; drawn as the line to get below.
        title: What the run is.
    """
    try:
        import matplotlib
    except ImportError:
        return "none: matplotlib is not installed (pip install 'mpipar[plots]')"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_metrics(metrics)
    steps = [m for m in lines if m.get("loss") is not None]
    evaluations = [m for m in lines if m.get("val_loss") is not None]
    if not steps:
        return "none: there are no steps to draw"
    tokens = [m["tokens"] / 1e6 for m in steps]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes.axhline(entropy, color="0.5", linestyle="--", linewidth=1, label=f"unigram entropy {entropy:.2f}")
    axes.plot(tokens, [m["loss"] for m in steps], color="#9ecae1", linewidth=0.8, label="training, each step")
    axes.plot(tokens, _smoothed([m["loss"] for m in steps]), color="#2171b5", linewidth=1.6, label="training, smoothed")
    if evaluations:
        last = evaluations[-1]["val_loss"]
        axes.plot(
            [m["tokens"] / 1e6 for m in evaluations],
            [m["val_loss"] for m in evaluations],
            "o-", color="#d94801", linewidth=1.2, markersize=4, label=f"validation, {last:.2f} at the end",
        )  # fmt: skip
    axes.set_xlabel("tokens, millions")
    axes.set_ylabel("loss, nats a token")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    with writing(picture), atomic_file(picture) as partial:
        figure.savefig(partial, format="png")
    pyplot.close(figure)
    return str(picture)


def _smoothed(values: list[float]) -> list[float]:
    """An exponential mean over about a fiftieth of the run."""
    weight = min(0.5, 50 / max(1, len(values)))
    smoothed, mean = [], values[0]
    for value in values:
        mean += weight * (value - mean)
        smoothed.append(mean)
    return smoothed
