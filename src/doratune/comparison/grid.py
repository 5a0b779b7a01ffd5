"""One grid: base model → sweep → final cells → tables, all in a folder that a second start finds and goes on in.

OUTPUT/grid.yaml       the grid                      OUTPUT/cells/…         one folder a cell (a run of doratune train)
OUTPUT/recipe.yaml     the training recipe           OUTPUT/logs/…          what each cell printed
OUTPUT/base/           the base model's scores       OUTPUT/compare.json    tables and figures
OUTPUT/analysis/       ΔM and ΔD
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

from ..analysis.runs import last_result
from ..analysis.summary import analyze
from ..baselines.config import METHODS as BASELINES
from ..checkpoint.base_model import load_base
from ..errors import UserError, listed
from ..evaluation.scorers import scorer_of
from ..support.files import read_json, replacing, write_json
from ..support.folders import refuse_no_folder
from ..support.outputs import refuse_inputs
from ..support.progress import Progress, silent
from ..support.text import read_text
from ..support.yaml_text import as_read_back, read_yaml, to_yaml
from ..training.checkpoints import last_checkpoint
from ..training.recipe import TrainRecipe
from ..training.train import write_recipe
from .cells import Cell, Rates, command, finals, folder_of, rates, recipe_of, refuse_mixed, shown, sweep
from .collect import Result, collect, finished, same_recipe
from .launch import Job, only_one, run_local, run_on_ray
from .rates import choose
from .recipe import CompareRecipe
from .summary import Summary, summarize


def compare(grid: CompareRecipe, say=print, progress: Progress = silent) -> Summary | None:
    """Run what is missing of the grid and summarize it; None after a dry run.

    Args:
        say: takes each line of the report. progress: as `support.progress`, of cells.

    Raises:
        UserError: a setting that is not usable, a folder of another grid, or nothing that finished.
        Stopped: a signal arrived.
    """
    shared = grid.check()
    refuse_mixed(grid, shared)
    output = Path(grid.output)
    inputs = {"the model": shared.model, "the data": shared.data, "the evaluation data": shared.eval_data, "a task": shared.tasks}
    refuse_inputs(output, inputs | {"the recipe": grid.recipe})
    refuse_no_folder(output)
    if grid.dry_run:
        return plan(grid, shared, say)
    with only_one(output):
        _record(grid, shared)
        (output / "compare.json").unlink(missing_ok=True)  # tables of what this grid was before; they come again at the end
        total = len(set(sweep(grid, shared)) | set(finals(grid, shared, _first_rates(grid, shared))))
        with progress(f"{output.name} cells", total) as advance:
            stages = Stages(grid, shared, say, advance)
            stages.run_base()
            stages.run(sweep(grid, shared))
            chosen, notes = choose(grid, shared)
            for note in notes:
                say(note)
            stages.run(finals(grid, shared, chosen))
        results, problems = collect(finals(grid, shared, chosen), grid, shared)
        if not results:
            raise UserError(f"no cell of {output} finished; see {output / 'logs'}")
        problems += strangers(grid, {*sweep(grid, shared), *finals(grid, shared, chosen)})
        problems += look_inside(grid, shared, results, say)
        notes += [note for note in [base_note(output / "base", grid.score)] if note]
        summary = summarize(grid, shared, results, chosen, [*notes, *problems])
        write_json(output / "compare.json", summary.to_dict())
    return summary


def strangers(grid: CompareRecipe, cells: set[Cell]) -> list[str]:
    """A line about folders that are none of the grid's, such as those of a method that it no longer has."""
    folder, known = Path(grid.output) / "cells", {cell.name for cell in cells}
    folders = sorted(p.name for p in folder.glob("*") if p.is_dir() and p.name not in known)
    return [f"{listed(folders)} in {folder}: none of this grid's cells; not counted"] if folders else []


def look_inside(grid: CompareRecipe, shared: TrainRecipe, results: list[Result], say) -> list[str]:
    """ΔM and ΔD of the first seed's runs that change weights (§3.2) into OUTPUT/analysis, once; a line for what went wrong."""
    folder = Path(grid.output) / "analysis"
    first = [r.cell for r in results if r.cell.seed == grid.seeds[0]]
    runs = [str(folder_of(c, grid)) for c in first if grid.settings_of(c.method)["method"] not in BASELINES]
    if not grid.analyze or not runs:
        return []
    try:
        if (folder / "points.json").is_file() and set(read_json(folder / "points.json", "delete it")) == set(runs):
            return []
        base = load_base(shared.model, last_result(runs))
        say(analyze(base, runs, tuple(grid.analyze), shared.magnitude_axis, folder, overwrite=True, spectrum="adapters").table())
    except UserError as error:
        return [f"no analysis: {error}"]
    return []


def plan(grid: CompareRecipe, shared: TrainRecipe, say) -> None:
    """Print the commands that remain: of the sweep, or, once that is finished, of the final cells."""
    _record(grid, shared)
    first = sweep(grid, shared)
    if any(remains(cell, grid, shared) for cell in first):
        cells = first
        say("# the sweep; give the same command again when these have run, for the rest")
    else:
        cells = finals(grid, shared, choose(grid, shared)[0])
    remaining = [cell for cell in cells if remains(cell, grid, shared)]
    for cell in remaining:
        say(shown(_words(cell, grid, shared)))
    if not remaining:
        say("# every cell has run; the same command without --dry_run makes the tables")


class Stages:
    """Runs the cells that are not finished yet, by the launcher that the grid names."""

    def __init__(self, grid: CompareRecipe, shared: TrainRecipe, say, advance: Callable[[int], None]):
        self.grid, self.shared, self.say, self.advance = grid, shared, say, advance
        self.counted: set[Cell] = set()

    def run_base(self) -> None:
        """Score the base model once: what the answers were before."""
        folder = Path(self.grid.output) / "base"
        scorer = scorer_of(self.shared.objective)
        if not self.shared.tasks or (folder / "results.json").is_file() or (scorer and not scorer.scores_bases):
            return
        words = [*base_command(self.shared), "--output", str(folder), "--overwrite"]
        self.launch([("base", words, self.log("base"))], lambda name, status: self.ended(name, status))

    def run(self, cells: list[Cell]) -> None:
        """All cells of a stage; a cell that was interrupted resumes from its checkpoint."""
        jobs: list[Job] = []
        by_name = {cell.name: cell for cell in cells}
        for cell in cells:
            if remains(cell, self.grid, self.shared):
                jobs.append((cell.name, _words(cell, self.grid, self.shared), self.log(cell.name)))
            else:
                self.count(cell)

        def done(name: str, status: int) -> None:
            cell = by_name[name]
            self.ended(name, status)
            self.count(cell)
            if status == 0:
                _forget_optimizer(folder_of(cell, self.grid))

        self.launch(jobs, done)

    def count(self, cell: Cell) -> None:
        if cell not in self.counted:
            self.counted.add(cell)
            self.advance(1)

    def launch(self, jobs: list[Job], done: Callable[[str, int], None]) -> None:
        if not jobs:
            return
        if self.grid.launcher == "ray":
            run_on_ray(jobs, done, self.grid.address, self.grid.cell_cpus, self.grid.cell_gpus)
        else:
            run_local(jobs, done)

    def log(self, name: str) -> str:
        return str(Path(self.grid.output) / "logs" / f"{name}.log")

    def ended(self, name: str, status: int) -> None:
        if status:
            self.say(f"{name} failed with status {status}: {_last_line(Path(self.log(name)))} ({self.log(name)})")
        else:
            self.say(f"{name} finished")


def base_command(shared: TrainRecipe) -> list[str]:
    """The words that score the base model as the cells are scored after their training."""
    prompt = "template" if shared.prompt == "template" else "plain"
    words = ["evaluate", "--model", shared.model, "--task", to_yaml(shared.tasks, flow=True), "--protocol", shared.tasks_protocol]
    words += ["--dtype", shared.dtype, "--batch_size", str(shared.tasks_batch_size), "--prompt", prompt, "--device", shared.device]
    words += ["--limit", str(shared.tasks_limit)] if shared.tasks_limit else []
    words += ["--quantize", shared.quantize]
    words += ["--mirror", shared.mirror] if shared.mirror else []
    words += ["--images", shared.images] if shared.images else []
    return words + (["--trust_remote_code", "true"] if shared.trust_remote_code else [])


def base_note(folder: Path, protocol: str) -> str:
    """A line about what the base model scored, and what its tasks' most frequent answers would; nothing where it was not scored."""
    try:
        results = [r for r in read_json(folder / "results.json", "delete it")["results"] if r["protocol"] == protocol]
        accuracy, majority = (100 * sum(r[key] for r in results) / len(results) for key in ("accuracy", "majority"))
    except (UserError, KeyError, TypeError, ZeroDivisionError):
        return ""
    return f"base model, {protocol}: {accuracy:.1f} %; the most frequent answer: {majority:.1f} %"


def remains(cell: Cell, grid: CompareRecipe, shared: TrainRecipe) -> bool:
    """Has the cell still to run? A folder that cannot be used is not run over: it becomes a line of the report."""
    try:
        return finished(cell, grid, shared) is None
    except UserError:
        return False


def _words(cell: Cell, grid: CompareRecipe, shared: TrainRecipe) -> list[str]:
    """The cell's command: it goes on from its checkpoint, or starts (again)."""
    folder = folder_of(cell, grid)
    same = last_checkpoint(folder) is not None
    if same:
        try:
            same_recipe(folder / "recipe.yaml", recipe_of(cell, grid, shared))
        except UserError:  # what another recipe began is not this cell's beginning
            same = False
    return command(cell, grid, shared, "--resume" if same else "--overwrite")


def _first_rates(grid: CompareRecipe, shared: TrainRecipe) -> Rates:
    return rates(grid, shared, {method: grid.lrs_of(method, shared)[0] for method in grid.methods})


def _record(grid: CompareRecipe, shared: TrainRecipe) -> None:
    """Write the grid and its training recipe, or refuse to go on in the folder of another one."""
    output = Path(grid.output)
    path, own = output / "grid.yaml", as_read_back(dataclasses.asdict(grid))
    if path.is_file():
        try:
            before = dict(read_yaml(path))
        except (TypeError, ValueError):  # UserError is one
            raise UserError(f"{path} is corrupt; give another output, or delete it") from None
        changed = [f"{k} {before[k]!r} -> {own[k]!r}" for k in ("settings", "recipe") if k in before and before[k] != own[k]]
        if path.read_text(encoding="utf-8") != to_yaml(before):
            raise UserError(f"{path} was not written by doratune compare; give another output, or move it away")
        if changed and list((output / "cells").glob("*/metrics.json")):
            raise UserError(f"{output} holds another grid ({listed(changed, 2)}); give another output, or the grid that it was")
        if changed:
            shutil.rmtree(output / "base", ignore_errors=True)
    elif output.is_dir() and any(p.name != ".lock" for p in output.iterdir()):
        raise UserError(f"{output} exists and holds no grid; give another output")
    with replacing(path) as temporary:
        temporary.write_text(to_yaml(own), encoding="utf-8")
    write_recipe(output / "recipe.yaml", shared)


def _forget_optimizer(folder: Path) -> None:
    """A finished cell is not resumed: its optimizer's state goes, its weights stay."""
    for path in folder.glob("checkpoint-*/optimizer.pt"):
        path.unlink()


def _last_line(log: Path) -> str:
    try:
        printed = [line for line in read_text(log, errors="replace").splitlines() if line.strip()]
    except OSError:
        printed = []
    return printed[-1][:300] if printed else "it printed nothing"
