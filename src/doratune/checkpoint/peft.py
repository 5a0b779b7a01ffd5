"""PEFT's adapter_config.json and key names, both ways. PEFT's own names appear in this file only.

What PEFT's format cannot say keeps the same layout under `peft_type: "DORATUNE"`, which PEFT rejects: an input-axis magnitude
on a square layer would otherwise load there and be silently wrong. Magnitude-only modules are rank 1 with B = 0 through
`rank_pattern`: exact. A folder with a non-default field that we do not honour is refused, the field named.
"""

from __future__ import annotations

import re
from typing import Any

from ..config import AdapterConfig
from ..errors import UserError, listed
from ..targets import ALL_LINEAR

PREFIX = "base_model.model."
PEFT_TYPE, OWN_TYPE = "LORA", "DORATUNE"

_HONOURED = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_dora", "use_rslora",
    "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "layers_pattern",
}  # fmt: skip
_HARMLESS = {
    "base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version", "fan_in_fan_out",
    "init_lora_weights", "megatron_core", "runtime_config", "qalora_group_size", "loftq_config",
    "ensure_weight_tying",
}  # fmt: skip
_PLAIN_STARTS = (True, False, "gaussian", None)


Alphas = dict[str, float]
Ranks = dict[str, int]


def to_peft(
    config: AdapterConfig, names: Ranks, alphas: Alphas, base_model: str | None, transposed: bool = False
) -> dict[str, Any]:
    """adapter_config.json for `names` (module → rank, 0 for magnitude only); transposed: weights are stored (I, O).

    Raises:
        UserError: the input axis, which PEFT does not have.
    """
    if config.has_magnitude and config.magnitude_axis == "input":
        raise UserError(
            "magnitude_axis is 'input', one magnitude per input column: PEFT's format has only one per output row; "
            'save with format="doratune"'
        )
    return _layout(config, names, alphas, base_model, transposed) | {"peft_type": PEFT_TYPE}


def to_own(config: AdapterConfig, names: Ranks, alphas: Alphas, base_model: str | None, transposed: bool = False) -> dict[str, Any]:
    """The same layout under our own type, for what PEFT cannot say."""
    return _layout(config, names, alphas, base_model, transposed) | {
        "peft_type": OWN_TYPE,
        "magnitude_axis": config.magnitude_axis,
    }


def _layout(
    config: AdapterConfig, names: Ranks, alphas: Alphas, base_model: str | None, transposed: bool = False
) -> dict[str, Any]:
    plain = not (config.magnitude_only or config.exclude) and config.targets != ALL_LINEAR
    targets = config.targets if isinstance(config.targets, str) else list(config.targets)
    ranks = {name: rank or 1 for name, rank in names.items() if (rank or 1) != config.rank}
    alphas = {name: alpha for name, alpha in alphas.items() if alpha != config.alpha}
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "modules_to_save": list(config.also_train) or None,
        "r": config.rank,
        "rank_pattern": {_anchored(name): rank for name, rank in ranks.items()},
        "alpha_pattern": {_anchored(name): alpha for name, alpha in alphas.items()},
        "revision": None,
        "target_modules": targets if plain else list(names),
        "task_type": None,
        "use_dora": config.has_magnitude,
        "use_rslora": config.rank_scaling == "rslora",
    }


def _anchored(name: str) -> str:
    """PEFT matches `(.*\\.)?(key)$` as a regex: anchored and escaped, a full name selects just that module."""
    return "^" + re.escape(name)


def from_peft(raw: dict[str, Any], where: str) -> AdapterConfig:
    """An AdapterConfig from adapter_config.json, rank and alpha patterns not yet resolved (see `pattern_value`).

    Raises:
        UserError: a field of the wrong type, or a non-default field that is not honoured.
    """
    kind = raw.get("peft_type")
    if kind not in (PEFT_TYPE, OWN_TYPE):
        raise UserError(f"{where}: peft_type is {kind!r}; this version loads {PEFT_TYPE} and {OWN_TYPE}")
    _refuse_unknown(raw, where)
    _check_types(raw, where)
    if not raw.get("target_modules"):
        raise UserError(f"{where}: target_modules is {raw.get('target_modules')!r}; expected names or a regex")
    if raw.get("use_dora") and raw.get("magnitude_axis", "output") not in ("output", "input"):
        raise UserError(f"{where}: magnitude_axis is {raw['magnitude_axis']!r}; expected output or input")
    return AdapterConfig(
        method="dora" if raw.get("use_dora") else "lora",
        rank=raw["r"],
        alpha=raw["lora_alpha"],
        rank_scaling="rslora" if raw.get("use_rslora") else "standard",
        dropout=raw.get("lora_dropout") or 0.0,
        targets=raw["target_modules"],
        exclude=raw.get("exclude_modules") or (),
        also_train=raw.get("modules_to_save") or (),
        magnitude_axis=raw.get("magnitude_axis", "output"),
    )


def _refuse_unknown(raw: dict[str, Any], where: str) -> None:
    known = _HONOURED | _HARMLESS | ({"magnitude_axis"} if raw.get("peft_type") == OWN_TYPE else set())
    bad = [f"{k}={raw[k]!r}" for k in sorted(set(raw) - known) if raw[k] and raw[k] != "none"]
    start = raw.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        bad.append(f"init_lora_weights={start!r} (it changes the base weights; convert the adapter to plain LoRA first)")
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
        required = name in ("r", "lora_alpha")
        if required and name not in raw:
            raise UserError(f"{where}: {name} is missing; expected {expected}")
        value = raw.get(name)
        bad_flag = isinstance(value, bool) and bool not in types
        if name in raw and (bad_flag or not isinstance(value, types)):
            raise UserError(f"{where}: {name} is {value!r}; expected {expected}")
        if name.endswith("_pattern") and any(
            isinstance(v, bool) or not isinstance(v, int | float) or v <= 0 for v in (value or {}).values()
        ):
            raise UserError(f"{where}: {name} is {value!r}; expected positive numbers")


def pattern_value(patterns: dict[str, Any] | None, name: str, default):
    """PEFT's rule: the first key that matches the end of the name as a regex, at a dot or at its start."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def file_key(name: str, parameter: str) -> str:
    """Our parameter name → PEFT's key in the file."""
    suffix = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}[parameter]
    return f"{PREFIX}{name}.{suffix}"


_KEY = re.compile(r"^(.*)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?$")


def parse_key(key: str) -> tuple[str, str]:
    """PEFT's key → (module name, parameter); ("", full key) for tensors of modules that are saved whole.

    Both spellings of the magnitude are read: `lora_magnitude_vector` and `lora_magnitude_vector.weight`."""
    key = key.removeprefix(PREFIX)
    if match := _KEY.match(key):
        return match[1], {"lora_magnitude_vector": "magnitude"}.get(match[2], match[2])
    return "", key.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
