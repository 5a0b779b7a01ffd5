"""Fig. 2 (ΔD against ΔM, one colour a layer, one marker a step, with the regression line) and Fig. 3 (both along the layers).

matplotlib, without a display; PNG or SVG by the file's name.
"""

from __future__ import annotations

from pathlib import Path

from .points import Line, Point

MARKERS = "osD^vP*Xhp"


def scatter(runs: dict[str, tuple[list[Point], Line | None]], path: Path) -> None:
    """Fig. 2: one panel for each run."""
    figure, axes = _panels(len(runs))
    for axis, (title, (points, line)) in zip(axes, runs.items(), strict=True):
        steps = sorted({p.step for p in points})
        layers = max(p.layer for p in points) or 1
        for number, step in enumerate(steps):
            some = [p for p in points if p.step == step]
            x, y = [p.direction for p in some], [p.magnitude for p in some]
            colours = [p.layer / layers for p in some]
            axis.scatter(
                x, y, c=colours, cmap="viridis", vmin=0, vmax=1, marker=MARKERS[number % len(MARKERS)], s=22, label=f"step {step}"
            )
        if line is not None:
            ends = [min(p.direction for p in points), max(p.direction for p in points)]
            axis.plot(ends, [line.intercept + line.slope * x for x in ends], color="black", linewidth=1)
            title += f", correlation {line.correlation:+.2f}"
        axis.set(title=title, xlabel="ΔD", ylabel="ΔM")
        axis.ticklabel_format(style="sci", scilimits=(-3, 3))
        axis.legend(fontsize="x-small")
    _write(figure, path)


def curves(runs: dict[str, list[Point]], path: Path) -> None:
    """Fig. 3: ΔM (top) and ΔD (bottom) of the last checkpoint along the layers, one line a module."""
    figure, axes = _panels(len(runs), rows=2)
    for column, (title, points) in enumerate(runs.items()):
        last = [p for p in points if p.step == max(q.step for q in points)]
        for row, quantity in enumerate(("magnitude", "direction")):
            axis = axes[row * len(runs) + column]
            for module in sorted({p.module for p in last}):
                some = sorted((p for p in last if p.module == module), key=lambda p: p.layer)
                axis.plot([p.layer for p in some], [getattr(p, quantity) for p in some], marker=".", label=module)
            axis.set(title=title if row == 0 else "", xlabel="layer", ylabel="ΔM" if row == 0 else "ΔD")
            axis.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
            axis.legend(fontsize="x-small")
    _write(figure, path)


def _panels(count: int, rows: int = 1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * count, 3.6 * rows), layout="constrained")
    return figure, list(figure.subplots(rows, count, squeeze=False).flat)


def _write(figure, path: Path) -> None:
    from ..checkpoint.files import replacing

    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=130)
