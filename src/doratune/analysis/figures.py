"""Fig. 2 (ΔD against ΔM, one colour a layer, one marker a step, with the regression line), Fig. 3 (both along the layers, and the
relative change of m), and the singular values of the updates.

matplotlib, without a display; PNG or SVG by the file's name.
"""

from __future__ import annotations

from pathlib import Path

from .points import Line, Point, along_layers, layer_number
from .spectrum import Spectrum

MARKERS = "osD^vP*Xhp"
ROWS = {"magnitude": "ΔM", "direction": "ΔD", "relative": "|Δm|/m"}
"""The rows of Fig. 3."""


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
    """Fig. 3: ΔM, ΔD and |Δm|/m (top to bottom) of the last checkpoint along the layers, one line a module."""
    figure, axes = _panels(len(runs), rows=len(ROWS))
    for column, (title, points) in enumerate(runs.items()):
        last = [p for p in points if p.step == max(q.step for q in points)]
        for row, (quantity, label) in enumerate(ROWS.items()):
            axis = axes[row * len(runs) + column]
            for module in sorted({p.module for p in last}):
                axis.plot(*along_layers(last, module, quantity), marker=".", label=module)
            axis.set(title=title if row == 0 else "", xlabel="layer", ylabel=label)
            axis.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
            axis.legend(fontsize="x-small")
    _write(figure, path)


def spectra(runs: dict[str, dict[str, Spectrum]], path: Path) -> None:
    """Singular values of each weight's update over |W|, one panel a run, one line a weight in its layer's colour.

    Over |W| (Frobenius), so that layers and runs compare: the height says how much was changed, the fall how many ways."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure, axes = _panels(len(runs), shared=True)
    layers = [max(0, layer_number(name)) for weights in runs.values() for name in weights]
    colours = ScalarMappable(Normalize(0, max(layers) or 1), "viridis")
    for axis, (title, weights) in zip(axes, runs.items(), strict=True):
        for name, spectrum in weights.items():
            heights = [
                v / spectrum.norm for v in spectrum.values if v > 1e-6 * spectrum.values[0] and spectrum.norm > 0
            ]  # not rounding
            colour = colours.to_rgba(max(0, layer_number(name)))
            axis.plot(range(1, len(heights) + 1), heights, color=colour, linewidth=0.9, marker=".", markersize=2)
        rank = sum(s.effective_rank for s in weights.values()) / len(weights)
        axis.set(title=f"{title}, effective rank {rank:.3g}", xlabel="singular value of the update", yscale="log")
    axes[0].set_ylabel("σ / |W|")
    figure.colorbar(colours, ax=axes, label="layer")
    _write(figure, path)


def _panels(count: int, rows: int = 1, shared: bool = False):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * count, 3.6 * rows), layout="constrained")
    return figure, list(figure.subplots(rows, count, squeeze=False, sharey=shared).flat)


def _write(figure, path: Path) -> None:
    from ..support.files import replacing

    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=130)
