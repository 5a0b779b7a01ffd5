"""Which modules a configuration selects: names, suffixes, regexes, "all-linear"; and why others are left out.

A list entry selects the module of that name and every module whose name ends in "." + entry (PEFT's rule). A string is a
regex that must match a whole name, "all-linear", or "all-layers" (convolutions and experts too). A pattern that selects nothing
is an error that names near misses; a module that cannot have what is configured is one that says why.

Experts have a layer `<module>.<weight>` for each batched weight, and their module stands for all of these; an attention stands for
itself and its `out_proj`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch
from torch import nn

from ..config import AdapterConfig
from ..directions import direction_for
from ..errors import UserError, listed, near_misses, with_article
from ..layers import kind_of
from ..layers.layouts import is_experts, layout_problem, named_layers
from ..layers.wrappers import named_modules, named_parameters
from ..support.patterns import NamePattern, is_name

ALL_LINEAR, ALL_LAYERS = "all-linear", "all-layers"

EXPERTS_LEFT_OUT = "expert weights; name them, or use all-layers"

Pattern = str | tuple[str, ...]


@dataclass(frozen=True)
class Selection:
    """What a configuration means for one model: module name → rank (0: magnitude only), and what was left out, with why."""

    ranks: dict[str, int]
    alphas: dict[str, float]
    left_out: dict[str, str] = field(default_factory=dict)
    also_train: tuple[str, ...] = ()


def select(model: nn.Module, config: AdapterConfig, loading: bool = False) -> Selection:
    """Resolve a configuration against a model; loading: ranks come from a file and are what they are.

    Raises:
        UserError: a pattern that matches nothing, a module that cannot be adapted, overlapping patterns, tied weights.
    """
    modules = {name: module for name, module in named_layers(model) if name}
    left_out: dict[str, str] = {}
    excluded = with_parts(_matching(config.exclude, modules, "exclude"), modules) if config.exclude else set()
    also = tuple(sorted(_matching(config.also_train, modules, "also_train"))) if config.also_train else ()
    _refuse_whole(modules, also)
    also = tuple(a for a in also if not any(a.startswith(b + ".") for b in also))
    covered = {name for name in modules if any(name == a or name.startswith(a + ".") for a in also)}

    chosen = _select(config.targets, "targets", model, modules, config, left_out) if config.targets else set()
    magnitudes = set()
    if config.magnitude_only:
        magnitudes = _select(config.magnitude_only, "magnitude_only", model, modules, config, left_out)
        if config.magnitude_only in (ALL_LINEAR, ALL_LAYERS):
            magnitudes -= chosen
    if config.layers:
        elsewhere = _elsewhere(config.layers, chosen | magnitudes)
        left_out.update(dict.fromkeys(sorted(elsewhere), "in another layer (layers)"))
        chosen, magnitudes = chosen - elsewhere, magnitudes - elsewhere
    if overlap := sorted(chosen & magnitudes):
        raise UserError(f"{listed(overlap)}: named by both targets and magnitude_only; keep each module in one of them")
    left_out.update({name: "excluded" for name in sorted((chosen | magnitudes) & excluded)})
    left_out.update({name: "trained whole (also_train)" for name in sorted((chosen | magnitudes) & covered)})
    chosen, magnitudes = chosen - excluded - covered, magnitudes - excluded - covered
    if not config.targets and not config.magnitude_only:
        raise UserError("targets is empty; name modules, or use all-linear or all-layers")
    if not chosen | magnitudes:
        raise UserError("targets select no module after exclude and also_train; leave fewer modules out")
    tied = _tied(model, modules, chosen | magnitudes)
    if tied and config.targets in (ALL_LINEAR, ALL_LAYERS) and len(tied) < len(chosen):
        left_out.update(tied)
        chosen, magnitudes = chosen - set(tied), magnitudes - set(tied)
    elif tied and not loading:  # a file's layers get weights of their own
        raise UserError(listed([f"{reason}; exclude {name} or give each a weight of its own" for name, reason in tied.items()], 3))
    ranks, alphas = _ranks_and_alphas(config, modules, chosen, magnitudes)
    if not loading:
        _check_ranks(config, modules, ranks, left_out)
    return Selection(ranks, alphas, left_out, also)


def _elsewhere(layers: tuple[int, ...], names: set[str]) -> set[str]:
    """Those of these modules that are in none of the layers; each layer must hold one.

    Raises:
        UserError: a layer without any.
    """
    index = {name: int(found[1]) if (found := re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)) else None for name in names}
    known = sorted({i for i in index.values() if i is not None})
    if missing := [str(i) for i in layers if i not in known]:
        have = f"they are in layers {known[0]} to {known[-1]}" if known else "their names have no index"
        raise UserError(f"layers: none of the selected modules is in layer {listed(missing)}; {have}")
    return {name for name, i in index.items() if i not in layers}


def name_matches(entries: tuple[str, ...], name: str) -> bool:
    """Does an entry of a list select the module of this name?"""
    return any(name == entry or name.endswith("." + entry) for entry in entries)


def bypassed_modules(model: nn.Module) -> dict[str, str]:
    """Linear layers whose own forward PyTorch does not call, so that an adapter there would do nothing: `out_proj` of an attention
    that is not adapted itself."""
    found = {}
    for name, module in named_modules(model):
        if isinstance(module, nn.MultiheadAttention):
            fix = f"adapt {name.split('.')[-1] or 'the attention'} itself, or use all-layers"
            found[f"{name}.out_proj" if name else "out_proj"] = (
                f"torch.nn.MultiheadAttention uses its weight, not its forward: {fix}"
            )
    return found


def with_parts(names: set[str], modules) -> set[str]:
    """An attention stands for itself and its `out_proj`, an experts module for its weights."""
    found = set(names)
    for name in names:
        if isinstance(modules[name], nn.MultiheadAttention):
            found.add(f"{name}.out_proj")
        elif is_experts(modules[name]) and layout_problem(modules[name]) is None:
            found.remove(name)
            found |= {n for n in modules if n.rpartition(".")[0] == name and _is_expert_weight(modules[n])}
    return found


def _is_expert_weight(module) -> bool:
    kind = kind_of(module)
    return kind is not None and kind.stacked


def output_head(model: nn.Module) -> str | None:
    """Name of the output head: what `get_output_embeddings` returns, else a linear layer called lm_head, score or so."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in named_modules(model):
        if module is head and head is not None:
            return name
    return next((n for n, _ in named_modules(model) if n.split(".")[-1] in ("lm_head", "embed_out", "score")), None)


def _select(pattern: Pattern, setting, model, modules, config: AdapterConfig, left_out) -> set[str]:
    bypassed = bypassed_modules(model)

    def reason(name: str, kind, found: set[str]) -> str | None:
        skipped = None if name.rpartition(".")[0] in found else bypassed.get(name)
        return skipped or kind.refusal(modules[name]) or _undefined(kind, modules[name], config)

    if pattern in (ALL_LINEAR, ALL_LAYERS):
        return _all(pattern, setting, model, modules, reason, left_out)
    found = with_parts(_matching(pattern, modules, setting), modules)
    problems = []
    for name in sorted(found):
        kind = kind_of(modules[name])
        if is_experts(modules[name]) and (problem := layout_problem(modules[name])):
            problems.append(f"{name}: {problem}")
            continue
        unknown = f"is {with_article(type(modules[name]).__name__)}, which has no adapter"
        problem = unknown if kind is None else reason(name, kind, found)
        if problem:
            inner = sorted({n.split(".")[-1] for n, m in modules.items() if n.startswith(name + ".") and kind_of(m)})
            problems.append(f"{name}: {problem}" + (f" (its layers: {', '.join(inner)})" if inner and kind is None else ""))
    if problems:
        raise UserError(f"{setting}: " + listed(problems, 3))
    return found


def _all(pattern: str, setting: str, model, modules, reason, left_out: dict[str, str]) -> set[str]:
    """Every layer of the pattern's kinds that can be adapted; the others go into `left_out`."""
    found, head = set(), output_head(model)
    for name, module in modules.items():
        kind = kind_of(module)
        if is_experts(module) and (problem := EXPERTS_LEFT_OUT if pattern == ALL_LINEAR else layout_problem(module)):
            left_out[name] = problem
        if kind is None or kind.by_name_only or (pattern == ALL_LINEAR and not kind.linear):
            continue
        if problem := "output head" if name == head else reason(name, kind, found):
            left_out[name] = problem
        else:
            found.add(name)
    if not found:
        raise UserError(
            f"{setting}: {pattern} finds no {'linear ' if pattern == ALL_LINEAR else ''}layer in {type(model).__name__}"
        )
    return found


def _undefined(kind, module, config: AdapterConfig) -> str | None:
    """Why this layer cannot have the configured axis or start, or None."""
    if kind.stacked and (config.start == "loftq" or config.magnitude_from == "original"):
        return "start 'loftq' and magnitude_from 'original' are for quantized weights, which expert weights are not"
    if config.has_magnitude and kind.axis(config) == "input" and (problem := kind.axis_refusal(module)):
        return f"{problem}; set magnitude_axis: output, or exclude it"
    return None


def _matching(pattern: Pattern, modules, setting: str) -> set[str]:
    """Names that a pattern selects; every entry must select at least one."""
    if isinstance(pattern, str):
        expression = NamePattern(pattern, setting)
        found = {name for name in modules if expression.matches(name)}
        if not found:
            hint = near_misses(pattern, {n.split(".")[-1] for n in modules} | {ALL_LINEAR, ALL_LAYERS} | set(modules))
            end = is_name(pattern) and any(name_matches((pattern,), name) for name in modules)
            way = f", and as a list, [{pattern!r}], it is the end of names" if end else ""
            raise UserError(f"{setting}: the regex {pattern!r} matches no whole module name{way}{hint}")
        return found
    found = set()
    for entry in pattern:
        hits = {name for name in modules if name_matches((entry,), name)}
        if not hits:
            known = {n.split(".")[-1] for n in modules} if "." not in entry else set(modules)
            raise UserError(f"{setting}: {entry!r} matches no module of this model{near_misses(entry, known)}")
        found |= hits
    return found


def _ranks_and_alphas(config, modules, chosen, magnitudes) -> tuple[dict[str, int], dict[str, float]]:
    for setting, overrides in (("rank_overrides", config.rank_overrides), ("alpha_overrides", config.alpha_overrides)):
        for key in overrides:
            if not any(name_matches((key,), name) for name in chosen):
                raise UserError(f"{setting}: {key!r} fits no target{near_misses(key, chosen)}")

    def resolve(overrides, name, default):
        return next((value for key, value in overrides.items() if name_matches((key,), name)), default)

    ordered = [name for name in modules if name in chosen or name in magnitudes]
    ranks = {n: 0 if n in magnitudes else resolve(config.rank_overrides, n, config.rank) for n in ordered}
    return ranks, {n: resolve(config.alpha_overrides, n, config.alpha) for n in ordered}


def _check_ranks(config: AdapterConfig, modules, ranks: dict[str, int], left_out: dict[str, str]) -> None:
    """Ranks that a layer is too small for: an error where it was named, left out where "all" of a kind were meant."""
    problems = {}
    for name, rank in ranks.items():
        shape = kind_of(modules[name]).base(modules[name]).shape(modules[name])[-2:]
        if rank and (problem := direction_for(config, rank).refusal(shape, rank)):
            problems[name] = problem
    if config.targets in (ALL_LINEAR, ALL_LAYERS) and len(problems) < len(ranks):
        left_out.update({name: f"{problem}; give it less in rank_overrides" for name, problem in problems.items()})
        for name in problems:
            del ranks[name]
            if isinstance(modules[name], nn.MultiheadAttention) and ranks.pop(f"{name}.out_proj", None) is not None:
                left_out[f"{name}.out_proj"] = f"{name} is not adapted, and alone it would be bypassed"
    elif problems:
        reasons = {problem: [n for n, p in problems.items() if p == problem] for problem in problems.values()}
        shown = [f"{problem} ({listed(names, 3)})" for problem, names in reasons.items()]
        raise UserError(f"rank: {listed(shown, 3)}; lower it, or give these modules less in rank_overrides")


def _refuse_whole(modules, names) -> None:
    """Modules that are trained whole need weights that can be trained."""
    for name in names:
        for inner, module in named_modules(modules[name]) if name in modules else ():
            kind = kind_of(module)
            base = None if kind is None else kind.base(module)
            if kind is not None and (base is None or not base.writable):
                where = f"{name}.{inner}" if inner else name
                raise UserError(
                    f"also_train: {where} is quantized and cannot be trained whole; name it in targets, or leave it out"
                )


def memory_of(parameter: nn.Parameter) -> int:
    """Where a parameter's numbers are; of one without memory, which object it is."""
    plain = type(parameter.data) is torch.Tensor and not parameter.is_meta and parameter.numel() > 0
    return parameter.data_ptr() if plain else id(parameter)


def _tied(model: nn.Module, modules, chosen: set[str]) -> dict[str, str]:
    """Weights shared with another module, with why they are refused: merging one view would silently change the other."""
    owners: dict[int, list[str]] = {}
    found = {}
    for name, parameter in named_parameters(model, remove_duplicate=False):
        owners.setdefault(memory_of(parameter), []).append(name)
    for name in sorted(chosen):
        kind = kind_of(modules[name])
        key = kind.key(name)
        weight = getattr(modules[name], kind.weight_name, None)
        others = [o for o in owners.get(memory_of(weight), ()) if o != key] if isinstance(weight, nn.Parameter) else []
        if others:
            found[name] = f"{key} is tied to {listed(others)}"
    return found
