"""The loss of a run as a picture, where matplotlib is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from ..support.files import replacing

PLOT = "loss.png"


def plot_loss(log: Sequence[dict], path: Path) -> bool:
    """Draw the losses of a run's log over its steps; False where there is none, or no matplotlib."""
    curves = {name: [(row["step"], row[key]) for row in log if key in row] for name, key in CURVES.items()}
    if not curves["training"] or importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for name, points in curves.items():
        if points:
            axes.plot(*zip(*points), marker=".", label=name)
    positive = all(value > 0 for points in curves.values() for _, value in points)
    axes.set(xlabel="optimizer step", ylabel="loss", yscale="log" if positive else "linear")
    axes.grid(alpha=0.3)
    if sum(map(bool, curves.values())) > 1:
        axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)
    return True


CURVES = {"training": "loss", "evaluation": "eval_loss", "of the thing": "instance_loss", "of its class": "prior_loss"}
"""Name of a curve → its figure in the log."""
