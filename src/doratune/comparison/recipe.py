"""CompareRecipe: the grid of `doratune compare`, and the names that it knows for methods.

methods × ranks × training-set sizes × seeds on one training recipe, each method, or each of its ranks, at the learning rate that
its own sweep found.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Literal

from ..errors import UserError, listed, near_misses
from ..evaluation.protocols import protocols_of
from ..evaluation.scorers import scorer_of
from ..evaluation.tasks import protocols_of_task
from ..support.fields import setting_names
from ..support.recipes import here_or_shipped
from ..support.values import Range, check_value, check_values, number
from ..support.yaml_text import read_yaml
from ..training.recipe import TrainRecipe, methods

PRESETS: dict[str, dict] = {
    "full": {"method": "full"},
    "lora": {"method": "lora"},
    "dora": {"method": "dora"},
    "dora_half": {"method": "dora", "rank_factor": 0.5},
    "dora_full_gradient": {"method": "dora", "norm_gradient": "full"},
    "magnitude_mix": {
        "method": "dora",
        "targets": ["q_proj", "k_proj", "v_proj"],
        "magnitude_only": ["o_proj", "gate_proj", "up_proj", "down_proj"],
    },
    "vera": {"method": "vera", "rank": 256},
    "dvora": {"method": "dvora", "rank": 256},
    "prefix": {"method": "prefix"},
    "series": {"method": "series"},
    "parallel": {"method": "parallel"},
}
"""Name → settings of doratune train. `rank_factor` multiplies the grid's rank (the paper's DoRA at half rank); a `rank` of its
own keeps a method out of the rank axis. magnitude_mix is §5.6: direction and magnitude on Q, K, V, magnitude alone elsewhere."""

RANKLESS = ("full", "prefix", "series", "parallel")
"""Methods of doratune train that have no rank."""

OWN = ("method", "seed", "output", "resume", "overwrite")
"""Settings that the grid itself sets."""


@dataclass(kw_only=True)
class CompareRecipe:
    """Settings of `doratune compare`.

    Args:
        recipe: training recipe (a YAML file of doratune train) that all cells share
        settings: changes to it for all cells, e.g. {max_steps: 100, eval_size: 200}
        source: where the grid comes from (for the reader)
        expected: the result to expect (for the reader)
        methods: full, lora, dora, dora_half, dora_full_gradient, magnitude_mix, vera, dvora, prefix, series, parallel,
            any other method of doratune train, or a name under variants
        variants: own methods by name, e.g. {dora_slow_m: {method: dora, magnitude_lr_ratio: 0.1}}
        ranks: ranks to compare; default the recipe's
        sizes: numbers of training examples to compare; default the recipe's
        seeds: of data order, subset, dropout and start; every method sees the same
        lrs: learning rates to try, a list for all methods
        method_lrs: by method, instead: as many for each as for the others, e.g. {full: [1e-5, 3e-5]}
        sweep_ranks: one (a method's sweep runs at one rank, the recipe's where the grid has it; the others take its rate, as in
            the paper) or every (each rank has a sweep of its own)
        tune_seeds: the sweep runs on the first so many seeds
        score: what ranks the methods: likelihood, generate or paper (accuracy, mean over tasks), or eval_loss
        confidence: of the intervals
        resamples: of the paired bootstrap
        analyze: modules for the scatter of ΔD and ΔM over the first seed's runs, e.g. [q_proj, v_proj]; none skips it
        launcher: local (one cell after the other) or ray (all cells of a stage on a Ray cluster that shares the folders)
        address: of the Ray cluster; default: the one of this machine, or a new local one
        cell_cpus: CPUs that a cell asks of Ray
        cell_gpus: GPUs that a cell asks of Ray
        dry_run: print the commands of the cells that remain, and run nothing
        output: folder of the grid; a grid that was stopped goes on where it was
    """

    recipe: str = ""
    settings: dict = field(default_factory=dict)
    source: str = ""
    expected: str = ""
    methods: list[str] = field(default_factory=lambda: ["full", "lora", "dora"])
    variants: dict = field(default_factory=dict)
    ranks: list[int] = number([], above=0)
    sizes: list[int] = number([], above=0)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    lrs: list[float] = number([], above=0)
    method_lrs: dict = field(default_factory=dict)
    sweep_ranks: Literal["one", "every"] = "one"
    tune_seeds: int = number(1, least=1)
    score: Literal["likelihood", "generate", "paper", "eval_loss"] = "likelihood"
    confidence: float = number(0.95, above=0, below=1)
    resamples: int = number(10_000, least=100)
    analyze: list[str] = field(default_factory=list)
    launcher: Literal["local", "ray"] = "local"
    address: str | None = None
    cell_cpus: float = number(1.0, least=0)
    cell_gpus: float = number(0.0, least=0)
    dry_run: bool = False
    output: str = "runs/compare"

    def check(self) -> TrainRecipe:
        """The training recipe that all cells share.

        Raises:
            UserError: a value outside its range, a recipe that is not usable, an unfair sweep.
        """
        check_values(self)
        if not self.recipe and not self.settings:
            raise UserError("neither recipe nor settings are set; give a grid, such as recipes/compare_demo.yaml")
        for name in ("methods", "seeds"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty; name at least one")
        for name in ("methods", "ranks", "sizes", "seeds", "lrs"):
            values = getattr(self, name)
            if twice := [v for v in dict.fromkeys(values) if values.count(v) > 1]:
                raise UserError(f"{name} holds {listed(map(str, twice))} twice; name each once")
        if self.tune_seeds > len(self.seeds):
            raise UserError(f"tune_seeds is {self.tune_seeds}; expected 1 to {len(self.seeds)} (the number of seeds)")
        shared = self.shared()
        for method in self.methods:
            self.settings_of(method)
        self._check_sweep(shared)
        return shared

    def shared(self) -> TrainRecipe:
        """The training recipe with the grid's settings, checked."""
        fields = set(setting_names(TrainRecipe))
        values = _read(self.recipe) | self.settings
        for name in self.settings:
            if name in OWN:
                raise UserError(f"settings holds {name}, which the grid itself sets; use methods, seeds or output")
        for name in values:
            if name not in fields:
                raise UserError(f"unknown setting {name!r} of doratune train{near_misses(name, fields)}")
        shared = TrainRecipe(**_numbers(values))
        shared.check()
        if self.score != "eval_loss" and not shared.tasks:
            raise UserError(f"score is {self.score}, but no tasks are scored; set settings: {{tasks: […]}}, or score: eval_loss")
        if self.score != "eval_loss" and self.score not in protocols_of(shared.tasks_protocol):
            raise UserError(f"score is {self.score}, but tasks_protocol is {shared.tasks_protocol}; make them agree")
        if self.score != "eval_loss":
            scorer = scorer_of(shared.objective)
            for task in shared.tasks:
                if self.score not in (have := scorer.protocols if scorer else protocols_of_task(task)):
                    raise UserError(f"score is {self.score}, which task {task} does not have; set score: {' or '.join(have)}")
        if self.score == "eval_loss" and not (shared.eval_size or shared.eval_data):
            raise UserError("score is eval_loss, but nothing is held out; set settings: {eval_size: N} or eval_data")
        return shared

    def settings_of(self, method: str) -> dict:
        """Settings of doratune train that make this method.

        Raises:
            UserError: an unknown name, or a setting that doratune train does not have.
        """
        plain = {name: {"method": name} for name in methods()}
        known = plain | PRESETS | self.variants
        if method not in known:
            raise UserError(f"unknown method {method!r}{near_misses(method, known)}; expected one of {', '.join(known)}")
        settings = known[method]
        fields = {*setting_names(TrainRecipe), "rank_factor"}
        if not isinstance(settings, dict) or "method" not in settings:
            raise UserError(f"variants: {method} needs settings with a method, e.g. {{method: dora, magnitude_lr_ratio: 0.1}}")
        if settings["method"] not in list(plain):
            raise UserError(f"variants: {method}: method is {settings['method']!r}; expected one of {', '.join(plain)}")
        for name in settings:
            if name not in fields or name in ("seed", "lr", "limit", "output", "resume", "overwrite"):
                raise UserError(f"variants: {method}: {name!r} is no setting of a method{near_misses(name, fields)}")
        if not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", method):
            raise UserError(f"variants: {method!r} names folders; give it letters, digits, _, -, + and . alone")
        check_value(f"variants: {method}: rank_factor", settings.get("rank_factor", 1), float, Range(above=0))
        return _numbers(settings)

    def lrs_of(self, method: str, shared: TrainRecipe) -> list[float]:
        """The learning rates of this method's sweep; one means that nothing is swept."""
        return [float(lr) for lr in self.method_lrs.get(method, self.lrs or [shared.lr])]

    def _check_sweep(self, shared: TrainRecipe) -> None:
        if unknown := [m for m in self.method_lrs if m not in self.methods]:
            raise UserError(f"method_lrs names {unknown[0]!r}, which is not among methods{near_misses(unknown[0], self.methods)}")
        for method, values in self.method_lrs.items():
            if not isinstance(values, list):
                raise UserError(f"method_lrs: {method} has {values!r}; expected a list of learning rates")
            try:
                rates = [float(value) for value in values]
            except (TypeError, ValueError):
                rates = [-1.0]
            if any(not 0 < rate < float("inf") for rate in rates) or len(set(rates)) < len(rates):
                raise UserError(f"method_lrs: {method} has {values}; expected positive numbers, each once")
        counts = {method: len(self.lrs_of(method, shared)) for method in self.methods}
        if 0 in counts.values():
            raise UserError(f"method_lrs: {next(m for m, n in counts.items() if not n)} has no learning rate; give at least one")
        if len(set(counts.values())) > 1:
            shown = ", ".join(f"{method} {count}" for method, count in counts.items())
            raise UserError(
                f"the methods have different numbers of learning rates ({shown}); give each the same, so that it is fair"
            )
        if max(counts.values()) > 1 and not (shared.eval_size or shared.eval_data):
            raise UserError("several learning rates, but nothing to choose by; set settings: {eval_size: N}, a validation split")


def _read(path: str) -> dict:
    if not path:
        return {}
    try:
        values = read_yaml(here_or_shipped(path))
    except UserError as error:
        raise UserError(f"recipe is {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"recipe is {path}, which holds no settings; give a recipe of doratune train")
    return values


def _numbers(values: dict) -> dict:
    """YAML reads 1e-3 as text; doratune train takes it as a number, and so does a grid."""
    types = {f.name: str(f.type) for f in dataclasses.fields(TrainRecipe)}
    settings = dict(values)
    for name, value in values.items():
        if isinstance(value, str) and types.get(name, "").startswith(("float", "int")):
            try:
                settings[name] = float(value) if types[name].startswith("float") else int(value)
            except ValueError:
                expected = "a number" if types[name].startswith("float") else "a whole number"
                raise UserError(f"{name} is {value!r}; expected {expected}") from None
    return settings
