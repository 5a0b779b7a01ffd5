"""Which settings runs share, which differ, and which runs may stand in one table: those of one model, one data set, the same tasks.

A plain comparison of what recipe.yaml and metrics.json say; it costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..config import AdapterConfig
from ..support.fields import setting_names
from .read import Run
from .tables import Table, shown

BOOKKEEPING = {
    "output", "source", "expected", "resume", "overwrite", "tensorboard", "report_to", "log_steps", "save_steps",
    "keep_checkpoints", "sample_prompts", "sample_steps", "sample_tokens",
}  # fmt: skip
"""Settings that change no weight."""

VARIED = set(setting_names(AdapterConfig)) | {
    "lr", "magnitude_lr_ratio", "output_factor_lr_ratio", "magnitude_decay",
    "whole_lr_ratio", "seed", "limit", "quantize", "double_quantization",
}  # fmt: skip
"""Settings that a comparison is about; any other that differs is named in a warning."""

DATA = (
    "data", "data_format", "mirror", "limit", "eval_data", "eval_size", "max_length", "too_long", "train_on_prompt",
    "group_by_length", "tasks", "tasks_protocol", "tasks_limit", "tasks_batch_size",
)  # fmt: skip


def split(values: Sequence[dict]) -> tuple[dict, list[str]]:
    """(what all share, the keys in which they differ or that some lack)."""
    keys = dict.fromkeys(key for value in values for key in value)
    common = {key: values[0][key] for key in keys if all(key in v and v[key] == values[0].get(key) for v in values)}
    return common, [key for key in keys if key not in common]


def settings_of(run: Run) -> dict:
    """The recipe without its bookkeeping; data in the run's own folder is named from there."""
    recipe = {key: value for key, value in run.recipe.items() if key not in BOOKKEEPING}
    inside = f"{run.recipe.get('output')}/"
    if isinstance(recipe.get("data"), str) and recipe["data"].startswith(inside):
        recipe["data"] = f"RUN/{recipe['data'].removeprefix(inside)}"
    return recipe


def environment_of(run: Run) -> dict:
    """The machine and versions that metrics.json records, flat; the date is the run's own."""
    environment = run.metrics.get("environment")
    if not isinstance(environment, dict):
        return {}
    flat = {key: value for key, value in environment.items() if key not in ("date", "versions")}
    return flat | (environment["versions"] if isinstance(environment.get("versions"), dict) else {})


def blocks(runs: Sequence[Run]) -> tuple[list[tuple[str, dict, list[str]]], Table | None]:
    """(title, what all runs share, what of it is unset) of each block, and the table of what differs."""
    recipes, machines = ([part(run) for run in runs] for part in (settings_of, environment_of))
    known = ([value for value in values if value] for values in (recipes, machines))
    (common, varying), (machine, moving) = (split(values) if values else ({}, []) for values in known)
    parts = {
        "Model and training": {key: value for key, value in common.items() if key not in DATA},
        "Data": {key: value for key, value in common.items() if key in DATA},
        "Environment": machine,
    }
    unset = {title: [key for key, value in part.items() if value in (None, "", [], {})] for title, part in parts.items()}
    told = {title: {k: _plain(v) for k, v in part.items() if k not in unset[title]} for title, part in parts.items()}
    shared = [(title, told[title], unset[title]) for title, part in parts.items() if part]
    rows = [[run.name, *(r.get(k) for k in varying), *(m.get(k) for k in moving)] for run, r, m in zip(runs, recipes, machines)]
    rows = [[_plain(cell) for cell in row] for row in rows]
    return shared, Table("What differs", ["run", *varying, *moving], rows) if varying or moving else None


def _plain(value) -> str:
    """Whole numbers of settings without thousands marks, so that they can be copied."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else shown(value)


def likeness(run: Run) -> tuple[str, str]:
    """What runs of one table share: model and data."""
    settings = settings_of(run)
    return shown(settings.get("model")), shown(settings.get("data"))


def groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that may stand in one table, by what they share; a run without scores goes to the first of its model and data."""
    scored = [run for run in runs if run.after.results]
    groups_by_key: dict[tuple, list[Run]] = {}
    for run in [*scored, *(run for run in runs if run not in scored)]:
        like, tasks = likeness(run), run.after.tasks()
        same = (key for key in groups_by_key if key[0] == like)
        key = (like, tasks) if tasks else next(same, (like, tasks))
        groups_by_key.setdefault(key, []).append(run)
    return {_title(*key): sorted(group, key=runs.index) for key, group in groups_by_key.items()}


def _title(like: tuple[str, str], tasks: tuple[tuple[str, int], ...]) -> str:
    counts = ", ".join(f"{name} ({total:,} items)" for name, total in tasks)
    return f"model {like[0]} · data {like[1]}" + (f" · {counts}" if counts else "")


def differences(runs: Sequence[Run]) -> list[str]:
    """A line for each setting that a comparison is not about, for scores of different tasks, and for a run that is there twice."""
    recipes = {run.name: settings_of(run) for run in runs if run.recipe}
    lines = []
    for key in split(list(recipes.values()))[1] if recipes else ():
        values: dict[str, list[str]] = {}
        for name, recipe in recipes.items():
            if key in recipe:
                values.setdefault(shown(recipe[key]), []).append(name)
        if len(values) > 1 and key not in VARIED:
            apart = "; they do not share a table" if key in ("model", "data") else ""
            lines.append(f"runs of different {key}: {_by_value(values)}{apart}")
    scored: dict[str, list[str]] = {}
    for run in runs:
        if run.after.results:
            scored.setdefault(", ".join(f"{task} {total:,}" for task, total in run.after.tasks()), []).append(run.name)
    if len(scored) > 1:
        lines.append(f"runs scored on different tasks or items: {_by_value(scored)}; they do not share a table")
    same: dict[str, list[str]] = {}
    for name, recipe in recipes.items():
        same.setdefault(repr(sorted(recipe.items())), []).append(name)
    for twice in (names for names in same.values() if len(names) > 1):
        seed = shown(recipes[twice[0]].get("seed"))
        lines.append(f"{' and '.join(twice)} ran the same recipe with the same seed ({seed}): one run twice, no second sample")
    return lines


def _by_value(values: dict[str, list[str]]) -> str:
    return "; ".join(f"{value} ({', '.join(names)})" for value, names in values.items())
