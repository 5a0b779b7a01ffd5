"""PEFT's adapter_config.json, both ways. PEFT's own names appear in this file and in `tensors.py` only.

What PEFT's format cannot say keeps the same layout under `peft_type: "DORATUNE"`, which PEFT rejects: an input-axis magnitude
on a square layer would otherwise load there and be silently wrong. Magnitude-only modules are rank 1 with B = 0 through
`rank_pattern`: exact. A folder with a non-default field that we do not honour is refused, the field named.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from ..adapter.targets import ALL_LAYERS, ALL_LINEAR
from ..config import AdapterConfig
from ..directions import direction_for, direction_of
from ..errors import UserError, listed
from ..layers import kind_of
from ..support.patterns import NamePattern

PEFT_TYPE, VERA_TYPE, OWN_TYPE = "LORA", "VERA", "DORATUNE"
OWN_FILE = "doratune.json"
PEFT_KINDS = ("Linear", "Conv1D", "Conv", "Embedding")

_HONOURED = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_dora", "use_rslora",
    "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "layers_pattern",
}  # fmt: skip
_HARMLESS = {
    "base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version", "fan_in_fan_out",
    "init_lora_weights", "megatron_core", "runtime_config", "qalora_group_size", "loftq_config",
    "ensure_weight_tying", "eva_config",
}  # fmt: skip
_HONOURED_VERA = {
    "peft_type", "r", "target_modules", "exclude_modules", "projection_prng_key", "vera_dropout", "modules_to_save",
    "layers_to_transform", "layers_pattern",
}  # fmt: skip
_HARMLESS_VERA = {"save_projection", "d_initial", "init_weights"}
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", None)
"""Starts that give A and B values and leave the base weights alone."""
_BASE_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Starts (by how their names begin) that take what A and B start from out of the base weights."""


_PREFIX = "base_model.model."

Alphas = dict[str, float]
Ranks = dict[str, int]


def cannot_say(config: AdapterConfig, layers: dict[str, tuple]) -> str | None:
    """Why PEFT's format has no words for this adapter, or None; layers: name → (kind, module)."""
    direction = direction_of(config.method)
    if direction.peft_type is None:
        return f"method is {config.method!r}, which PEFT has not"
    if direction.peft_type == VERA_TYPE and config.has_magnitude:
        return f"method is {config.method!r}: PEFT's VeRA has no magnitude"
    for name, (kind, module) in layers.items():
        if kind.name not in PEFT_KINDS:
            return f"{name} is of the kind {kind.name}, whose adapters PEFT writes otherwise"
        if kind.name not in direction.peft_kinds:
            return f"{name}: PEFT's VeRA is for linear layers only"
        if config.has_magnitude and kind.axis(config) != kind.peft_axis:
            if kind.peft_axis == "input":
                return (
                    f"{name} has a magnitude per token: PEFT's format has only one per dimension (embedding_magnitude='dimension')"
                )
            return "magnitude_axis is 'input', one magnitude per input column: PEFT's format has only one per output row"
        if hasattr(module, "padding_mode") and (problem := filter_problem(module)):
            return f"{name} is a convolution with {problem}, for which PEFT's filters cannot be merged"
    return None


def filter_problem(module) -> str | None:
    """Why PEFT's A filters, without groups, dilation or a padding mode, are not ΔW = B·A for this convolution; None: they are."""
    if module.groups > 1:
        return f"groups={module.groups}"
    if any(d != 1 for d in module.dilation):
        return f"dilation={tuple(module.dilation)}"
    return f"padding_mode={module.padding_mode!r}" if module.padding_mode != "zeros" else None


def ending_so(entries, names: list[str]) -> list[str]:
    """Modules that PEFT trains whole for `modules_to_save`: every one whose name, behind PEFT's own prefix, ends so."""
    return [name for name in names if any(f"{_PREFIX}{name}".endswith(entry) for entry in entries)]


def modules_to_save(entries, trained: tuple[str, ...], names: list[str]) -> list[str] | None:
    """What makes PEFT train just these modules whole: the configured entries, else their full names; None: nothing does."""
    spellings = list(entries), list(trained), [_PREFIX + name for name in trained]
    return next((list(words) for words in spellings if set(ending_so(words, names)) == set(trained)), None)


def axis_problems(config: AdapterConfig, layers: dict) -> list[str]:
    """Magnitudes on an axis that a folder of PEFT's type does not have: doratune.json contradicts adapter_config.json."""
    kinds = {name: kind_of(layer) for name, layer in layers.items()} if config.has_magnitude else {}
    return [
        f"{name}: {OWN_FILE} says one magnitude per {kind.axis(config)}, in a folder of PEFT's type it is per {kind.peft_axis}; "
        f"delete {OWN_FILE} if adapter_config.json is right"
        for name, kind in kinds.items()
        if kind.axis(config) != kind.peft_axis
    ]


def filter_problems(modules: dict) -> list[str]:
    """What is wrong with PEFT's own adapters on such convolutions (a folder of our type holds ΔW = B·A)."""
    problems = {name: filter_problem(module) for name, module in modules.items() if hasattr(module, "padding_mode")}
    return [
        f"{name} is a convolution with {problem}, for which PEFT's filters have a form that cannot merge"
        for name, problem in problems.items()
        if problem
    ]


def as_written(config: AdapterConfig) -> AdapterConfig:
    """What adapter_config.json says of a configuration: an offset start is a LoRA of twice the rank (`file_rank`)."""
    times = direction_for(config, config.rank).file_rank
    if times == 1:
        return config
    factor = times**0.5 if config.rank_scaling == "rslora" else times
    return replace(
        config,
        start="zero",
        rank=times * config.rank,
        alpha=factor * config.alpha,
        rank_overrides={name: times * rank for name, rank in config.rank_overrides.items()},
        alpha_overrides={name: factor * alpha for name, alpha in config.alpha_overrides.items()},
    )


def describe(
    config: AdapterConfig,
    names: Ranks,
    alphas: Alphas,
    base_model: str | None,
    transposed: bool = False,
    own: bool = False,
    also_train: list[str] | None = None,
) -> dict[str, Any]:
    """adapter_config.json for `names` (module → rank, 0: magnitude only); transposed: weights are stored (I, O); own: our type;
    also_train: what to write for modules trained whole."""
    written = as_written(config)
    factor = written.rank // config.rank
    ranks = {name: rank * factor or 1 for name, rank in names.items() if (rank * factor or 1) != written.rank}
    factor = written.alpha / config.alpha
    alphas = {name: alpha * factor for name, alpha in alphas.items() if alpha * factor != written.alpha}
    common = _common(written, names, base_model, transposed, written.also_train if also_train is None else also_train)
    if direction_of(config.method).peft_type == VERA_TYPE and not own:
        return common | {
            "peft_type": VERA_TYPE,
            "d_initial": 0.1,
            "init_weights": True,
            "projection_prng_key": config.seed,
            "save_projection": True,
            "vera_dropout": config.dropout,
        }
    described = common | {
        "peft_type": PEFT_TYPE,
        "init_lora_weights": True,
        "lora_alpha": written.alpha,
        "lora_dropout": written.dropout,
        "rank_pattern": {_anchored(name): rank for name, rank in ranks.items()},
        "alpha_pattern": {_anchored(name): alpha for name, alpha in alphas.items()},
        "use_dora": written.has_magnitude,
        "use_rslora": written.rank_scaling == "rslora",
    }
    ours = {"peft_type": OWN_TYPE, "method": config.method, "magnitude_axis": config.magnitude_axis}
    return described | (ours | {"embedding_magnitude": config.embedding_magnitude} if own else {})


def _common(config: AdapterConfig, names: Ranks, base_model: str | None, transposed: bool, also_train) -> dict[str, Any]:
    plain = not (config.magnitude_only or config.exclude or config.layers) and config.targets not in (ALL_LINEAR, ALL_LAYERS)
    targets = config.targets if isinstance(config.targets, str) else list(config.targets)
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "modules_to_save": list(also_train) or None,
        "r": config.rank,
        "revision": None,
        "target_modules": targets if plain else list(names),
        "task_type": None,
    }


def _anchored(name: str) -> str:
    """PEFT matches `(.*\\.)?(key)$` as a regex: anchored and escaped, a full name selects just that module."""
    return "^" + re.escape(name)


def from_peft(raw: dict[str, Any], where: str) -> AdapterConfig:
    """An AdapterConfig from adapter_config.json, rank and alpha patterns not yet resolved (see `PatternValues`).

    Raises:
        UserError: a field of the wrong type, or a non-default field that is not honoured.
    """
    kind = raw.get("peft_type")
    if kind not in (PEFT_TYPE, VERA_TYPE, OWN_TYPE):
        raise UserError(f"{where}: peft_type is {kind!r}; this version loads {PEFT_TYPE}, {VERA_TYPE} and {OWN_TYPE}")
    _refuse_unknown(raw, where)
    _check_types(raw, where)
    if not raw.get("target_modules"):
        raise UserError(f"{where}: target_modules is {raw.get('target_modules')!r}; expected names or a regex")
    if raw.get("magnitude_axis", "output") not in ("output", "input"):
        raise UserError(f"{where}: magnitude_axis is {raw['magnitude_axis']!r}; expected output or input")
    method = "dora" if raw.get("use_dora") else "lora"
    common = {
        "rank": raw["r"],
        "targets": raw["target_modules"],
        "exclude": raw.get("exclude_modules") or (),
        "also_train": raw.get("modules_to_save") or (),
    }
    if kind == VERA_TYPE:
        return AdapterConfig(
            method="vera", dropout=raw.get("vera_dropout") or 0.0, seed=raw.get("projection_prng_key") or 0, **common
        )
    return AdapterConfig(
        method=raw.get("method", method) if kind == OWN_TYPE else method,
        alpha=raw["lora_alpha"],
        rank_scaling="rslora" if raw.get("use_rslora") else "standard",
        dropout=raw.get("lora_dropout") or 0.0,
        magnitude_axis=raw.get("magnitude_axis", "output"),
        embedding_magnitude=raw.get("embedding_magnitude", "dimension"),  # PEFT's kind
        **common,
    )


def _refuse_unknown(raw: dict[str, Any], where: str) -> None:
    kind = raw.get("peft_type")
    ours = {"method", "magnitude_axis", "embedding_magnitude"} if kind == OWN_TYPE else set()
    known = _HARMLESS | (_HONOURED_VERA | _HARMLESS_VERA if kind == VERA_TYPE else _HONOURED | ours)
    bad = [f"{k}={raw[k]!r}" for k in sorted(set(raw) - known) if raw[k] and raw[k] != "none"]
    start = raw.get("init_lora_weights", True)
    if str(start).lower().startswith(_BASE_STARTS):
        bad.append(f"init_lora_weights={start!r} (it changes the base weights; convert the adapter to plain LoRA first)")
    elif start not in _PLAIN_STARTS:
        bad.append(f"init_lora_weights={start!r}")
    if raw.get("loftq_config"):
        bad.append(f"loftq_config={raw['loftq_config']!r}")
    if bad:
        raise UserError(f"{where}: {listed(bad, 8)}: not supported, and ignoring it would change the result")


_TYPES: dict[str, tuple[tuple, str]] = {
    "r": ((int,), "a whole number"),
    "lora_alpha": ((int, float), "a number"),
    "lora_dropout": ((int, float, type(None)), "a number"),
    "target_modules": ((str, list, type(None)), "a list of names or a regex"),
    "exclude_modules": ((str, list, type(None)), "a list of names or a regex"),
    "modules_to_save": ((list, type(None)), "a list of names"),
    "rank_pattern": ((dict, type(None)), "an object"),
    "alpha_pattern": ((dict, type(None)), "an object"),
    "use_dora": ((bool, type(None)), "true or false"),
    "use_rslora": ((bool, type(None)), "true or false"),
}


def _check_types(raw: dict[str, Any], where: str) -> None:
    for name, (types, expected) in _TYPES.items():
        required = name == "r" or (name == "lora_alpha" and raw.get("peft_type") != VERA_TYPE)
        if required and name not in raw:
            raise UserError(f"{where}: {name} is missing; expected {expected}")
        value = raw.get(name)
        bad_flag = isinstance(value, bool) and bool not in types
        if name in raw and (bad_flag or not isinstance(value, types)):
            raise UserError(f"{where}: {name} is {value!r}; expected {expected}")
        if name.endswith("_pattern") and not all(_is_positive(v, name == "rank_pattern") for v in (value or {}).values()):
            raise UserError(f"{where}: {name} is {value!r}; expected positive {'whole ' * (name == 'rank_pattern')}numbers")
        for entry in value if isinstance(value, list) else ():
            if not isinstance(entry, str) or not entry:
                raise UserError(f"{where}: {name} holds {entry!r}; expected names of modules")


def _is_positive(value, whole: bool) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value < float("inf") and (not whole or value == int(value))


class PatternValues:
    """`rank_pattern` or `alpha_pattern`; PEFT's rule: the first key that matches the end of a name as a regex, at a dot or at its
    start."""

    def __init__(self, raw: dict[str, Any], setting: str):
        values = (raw.get(setting) or {}).items()
        self.values = [(NamePattern(rf"(.*\.)?({key})", f"{setting} {key!r}"), value) for key, value in values]

    def of(self, name: str, default):
        return next((value for pattern, value in self.values if pattern.matches(name)), default)
