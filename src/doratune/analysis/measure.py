"""Everything that is measured of one run against its base model (§3.2, §4.2), checkpoint by checkpoint.

A checkpoint that cannot be measured (corrupt, of another model) is said and left out; the others count. So are weights that no
checkpoint has changed, such as those of a frozen image tower: at (0, 0) they would make any line. Cost: one model in memory
(two for runs of ordinary models), one pass over the chosen weights for each checkpoint; of the last one also the spectra (see
`spectrum`) and, with a batch, a backward pass of the base and one of the trained model.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from ..adapter.attach import adapters, detach
from ..adapter.fresh import fresh_parameters
from ..checkpoint.adapter import CONFIG, load, read_folder
from ..checkpoint.base_model import load_base
from ..errors import UserError, listed
from .change import Change, layer_change, matrix_of, model_changes, named_parts
from .gradients import gradient_shares
from .points import Point, layer_number, module_name
from .runs import checkpoints
from .spectrum import Spectrum, difference_spectrum, summarized, update_spectrum

SPECTRA = ("all", "adapters", "none")


@dataclass(frozen=True)
class Wanted:
    """What is measured.

    Args:
        modules: last names of the weights that count (the paper: query and value); none: all (of a run with adapters: all adapted).
        magnitude_axis: of ordinary models; adapters have their own.
        spectrum: of the last checkpoint: all; adapters, because that of a dense weight costs; or none.
        batch: for the shares of its loss's gradient; None: no gradients.
        check_base: as `doratune.load`.
    """

    modules: tuple[str, ...] = ()
    magnitude_axis: str = "output"
    spectrum: str = "all"
    batch: Mapping | None = None
    check_base: bool = True

    def counts(self, name: str) -> bool:
        return not self.modules or module_name(name) in self.modules


@dataclass
class Measured:
    """A run's points, in order of steps; of its last checkpoint the spectra and {"base" | "end": {layer: share}} of gradients.

    `problems` has a line for each checkpoint that could not be measured, `unchanged` the names of weights that are not in it, since
    the run left them as they were."""

    points: list[Point] = field(default_factory=list)
    spectra: dict[str, Spectrum] = field(default_factory=dict)
    gradients: dict[str, dict[str, float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)

    def leave_out_unchanged(self) -> None:
        """Take out the weights that no checkpoint has changed; all stay where the run has changed nothing."""
        changed = {p.name for p in self.points if p.magnitude or p.direction}
        if not changed:
            return
        self.unchanged = sorted({p.name for p in self.points} - changed)
        self.points = [p for p in self.points if p.name in changed]
        self.spectra = {name: spectrum for name, spectrum in self.spectra.items() if name in changed}

    @property
    def last(self) -> list[Point]:
        """The points of the last checkpoint."""
        return [p for p in self.points if p.step == self.points[-1].step]


@dataclass
class _Checkpoint:
    changes: dict[str, Change]
    spectra: dict[str, Spectrum] = field(default_factory=dict)
    gradients: dict[str, dict[str, float]] = field(default_factory=dict)

    def points(self, step: int) -> list[Point]:
        end = self.gradients.get("end", {})
        return [
            Point(
                name=name,
                layer=layer_number(name),
                module=module_name(name),
                step=step,
                magnitude=change.magnitude,
                direction=change.direction,
                relative=change.relative,
                effective_rank=self.spectra[name].effective_rank if name in self.spectra else None,
                gradient_share=end.get(name),
            )
            for name, change in self.changes.items()
        ]


def measure(base: nn.Module, run: str | Path, wanted: Wanted) -> Measured:
    """A run against its base model, which is left as it was.

    Raises:
        UserError: no such run, modules that name nothing, or no checkpoint that could be measured.
    """
    result = Measured()
    for step, folder in reversed(checkpoints(Path(run))):  # the last one first: it is looked at more closely
        try:
            checkpoint = _look(base, folder, wanted, last=not result.points)
        except UserError as error:
            result.problems.insert(0, one_line(error))
            continue
        result.points[:0] = checkpoint.points(step)
        result.spectra |= checkpoint.spectra
        result.gradients |= checkpoint.gradients
    if not result.points and result.problems:
        more = len(result.problems) - 1
        raise UserError(result.problems[-1] + (f" (and {more} more of its checkpoints cannot be measured)" if more else ""))
    if not result.points:
        raise UserError(f"{run}: no weight is named {listed(wanted.modules)}; name modules as q_proj")
    result.leave_out_unchanged()
    return result


def one_line(error: UserError, longest: int = 400) -> str:
    """What is wrong, cut: an adapter of another model can misfit in hundreds of tensors."""
    return textwrap.shorten(str(error), longest, placeholder=" …")


def _look(base: nn.Module, folder: Path, wanted: Wanted, last: bool) -> _Checkpoint:
    look = _look_at_adapter if (folder / CONFIG).is_file() else _look_at_model
    return look(base, folder, wanted, last)


def _finite(changes: dict[str, Change], folder: Path) -> dict[str, Change]:
    if broken := [name for name, c in changes.items() if not (math.isfinite(c.magnitude) and math.isfinite(c.direction))]:
        raise UserError(f"{folder} holds NaN or infinite values in {listed(broken, 2)}; there is no change to measure")
    return changes


def _look_at_adapter(base: nn.Module, folder: Path, wanted: Wanted, last: bool) -> _Checkpoint:
    read_folder(folder)  # says what is wrong before the base is touched
    load(base, folder, check_base=wanted.check_base)
    try:
        parts = {name: part for name, part in named_parts(base) if wanted.counts(name)}
        checkpoint = _Checkpoint(_finite({name: layer_change(part) for name, part in parts.items()}, folder))
        if last and wanted.spectrum != "none":
            checkpoint.spectra = {name: _of_layer(part) for name, part in parts.items()}
        axes = {name: layer.adapted.axis for name, layer in adapters(base) if name in parts}
        if last and wanted.batch is not None and axes:
            checkpoint.gradients["end"] = gradient_shares(base, wanted.batch, tuple(axes))
    finally:
        detach(base)
    if "end" in checkpoint.gradients:
        start: dict[str, float] = {}
        for axis in sorted(set(axes.values())):
            start |= gradient_shares(base, wanted.batch, [name for name in axes if axes[name] == axis], axis)
        checkpoint.gradients["base"] = start
    return checkpoint


def _of_layer(part) -> Spectrum:
    return summarized(update_spectrum(part), math.sqrt(part.facts.w2.sum().item()))


def _look_at_model(base: nn.Module, folder: Path, wanted: Wanted, last: bool) -> _Checkpoint:
    matrices = [n for n, m in base.named_modules() if getattr(m, "weight", None) is not None and m.weight.dim() > 1]
    new = fresh_parameters(base)  # drawn for this model, not what the training began with
    names = [name for name in matrices if wanted.counts(name) and f"{name}.weight" not in new]
    after = load_base(str(folder), dtype=next(base.parameters()).dtype)
    checkpoint = _Checkpoint(model_changes(base, after, names, wanted.magnitude_axis))
    if last and wanted.spectrum == "all":
        for name in names:
            W, W_t = matrix_of(base, name), matrix_of(after, name)
            checkpoint.spectra[name] = summarized(difference_spectrum(W, W_t), W.double().norm().item())
    if last and wanted.batch is not None and names:
        for when, model in (("base", base), ("end", after)):
            checkpoint.gradients[when] = gradient_shares(model, wanted.batch, names, wanted.magnitude_axis)
    return checkpoint
