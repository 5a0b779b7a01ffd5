"""Which modules a configuration selects: names, suffixes, regexes, "all-linear"; and why others are left out.

A list entry selects the module of that name and every module whose name ends in "." + entry (PEFT's rule). A string is a
regex that must match a whole name, or "all-linear". A pattern that selects nothing is an error that names near misses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import nn

from .config import AdapterConfig
from .errors import UserError, listed, near_misses
from .layers import kind_of

ALL_LINEAR = "all-linear"

Pattern = str | tuple[str, ...]


@dataclass(frozen=True)
class Selection:
    """What a configuration means for one model: module name → rank (0: magnitude only), and what was left out, with why."""

    ranks: dict[str, int]
    alphas: dict[str, float]
    left_out: dict[str, str] = field(default_factory=dict)
    also_train: tuple[str, ...] = ()


def select(model: nn.Module, config: AdapterConfig) -> Selection:
    """Resolve a configuration against a model.

    Raises:
        UserError: a pattern that matches nothing, a module that cannot be adapted, overlapping patterns, tied weights.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    bypassed, left_out = bypassed_modules(model), {}
    excluded = _matching(config.exclude, modules, "exclude") if config.exclude else set()
    also = tuple(sorted(_matching(config.also_train, modules, "also_train"))) if config.also_train else ()
    also = tuple(a for a in also if not any(a.startswith(b + ".") for b in also))
    covered = {name for name in modules if any(name == a or name.startswith(a + ".") for a in also)}

    chosen = _select(config.targets, "targets", model, modules, bypassed, left_out) if config.targets else set()
    magnitudes = set()
    if config.magnitude_only:
        magnitudes = _select(config.magnitude_only, "magnitude_only", model, modules, bypassed, left_out)
        if config.magnitude_only == ALL_LINEAR:
            magnitudes -= chosen
    if overlap := sorted(chosen & magnitudes):
        raise UserError(f"{listed(overlap)}: named by both targets and magnitude_only; keep each module in one of them")
    left_out.update({name: "excluded" for name in sorted((chosen | magnitudes) & excluded)})
    left_out.update({name: "trained whole (also_train)" for name in sorted((chosen | magnitudes) & covered)})
    chosen, magnitudes = chosen - excluded - covered, magnitudes - excluded - covered
    if not chosen | magnitudes:
        raise UserError("targets select no module after exclude and also_train; leave fewer modules out")
    _refuse_tied(model, modules, chosen | magnitudes)
    return Selection(*_ranks_and_alphas(config, modules, chosen, magnitudes), left_out, also)


def name_matches(pattern: Pattern, name: str) -> bool:
    """Does a pattern select the module of this name? (not for "all-linear", which depends on the model)"""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == entry or name.endswith("." + entry) for entry in pattern)


def bypassed_modules(model: nn.Module) -> dict[str, str]:
    """Linear layers whose own forward PyTorch does not call, so that an adapter there would do nothing."""
    found = {}
    for name, module in model.named_modules():
        prefix = name + "." if name else ""
        if isinstance(module, nn.MultiheadAttention):
            found[prefix + "out_proj"] = "torch.nn.MultiheadAttention uses its weight, not its forward"
        elif isinstance(module, nn.TransformerEncoderLayer):
            for part in ("linear1", "linear2"):
                found[prefix + part] = "torch.nn.TransformerEncoderLayer bypasses its forward in evaluation"
    return found


def output_head(model: nn.Module) -> str | None:
    """Name of the output head: what `get_output_embeddings` returns, else a linear layer called lm_head, score or so."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in model.named_modules():
        if module is head and head is not None:
            return name
    return next((n for n, _ in model.named_modules() if n.split(".")[-1] in ("lm_head", "embed_out", "score")), None)


def _select(pattern: Pattern, setting, model, modules, bypassed, left_out) -> set[str]:
    if pattern == ALL_LINEAR:
        found, head = set(), output_head(model)
        for name, module in modules.items():
            kind = kind_of(module)
            if kind is None:
                continue
            reason = "output head" if name == head else bypassed.get(name) or kind.refusal(module)
            if reason:
                left_out[name] = reason
            else:
                found.add(name)
        if not found:
            raise UserError(f"{setting}: all-linear finds no linear layer in {type(model).__name__}")
        return found
    found = _matching(pattern, modules, setting)
    problems = []
    for name in sorted(found):
        kind = kind_of(modules[name])
        reason = f"is a {type(modules[name]).__name__}, which has no adapter" if kind is None else None
        reason = reason or bypassed.get(name) or kind.refusal(modules[name])
        if reason:
            inner = sorted({n.split(".")[-1] for n, m in modules.items() if n.startswith(name + ".") and kind_of(m)})
            problems.append(f"{name}: {reason}" + (f" (its linear layers: {', '.join(inner)})" if inner else ""))
    if problems:
        raise UserError(f"{setting}: " + listed(problems, 3))
    return found


def _matching(pattern: Pattern, modules, setting: str) -> set[str]:
    """Names that a pattern selects; every entry must select at least one."""
    if isinstance(pattern, str):
        try:
            found = {name for name in modules if re.fullmatch(pattern, name)}
        except re.error as error:
            raise UserError(f"{setting}: {pattern!r} is not a valid regular expression: {error}") from None
        if not found:
            hint = near_misses(pattern, {n.split(".")[-1] for n in modules} | set(modules))
            raise UserError(f"{setting}: the regex {pattern!r} matches no whole module name{hint}")
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


def _refuse_tied(model: nn.Module, modules, chosen: set[str]) -> None:
    """A weight shared with another module is refused: merging one view would silently change the other."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name in sorted(chosen):
        others = [o for o in owners[id(modules[name].weight)] if o != f"{name}.weight"]
        if others:
            raise UserError(f"{name}.weight is tied to {listed(others)}; exclude {name} or give each a weight of its own")
