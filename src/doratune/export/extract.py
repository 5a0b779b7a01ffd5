"""A DoRA adapter out of a base model and a fully fine-tuned one: m = |W'| per row, the direction by a low-rank fit (`fit.py`).

What is fine-tuned but in no adapted layer (embeddings, norms, the head) is lost unless it is named to be stored whole; the largest
of it is reported. Cost: the base model in memory, one tensor of the tuned one at a time, and for each layer the cost of its fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ..adapter.attach import adapters, attach
from ..adapter.targets import select
from ..checkpoint.adapter import save
from ..config import AdapterConfig
from ..errors import UserError, listed
from ..layers import kind_of
from ..layers.layouts import named_layers
from ..support.files import read_json, write_json
from ..support.folders import new_folder, refuse_existing
from ..support.models import load_model
from ..support.tables import aligned
from .fit import LowRankFit, fit
from .weights import Weights


@dataclass(frozen=True)
class Extraction:
    """What was fitted: layer → (share of its update that is missing, the same by plain SVD, that of W'); what changed elsewhere."""

    folder: Path
    layers: dict[str, tuple[float, float, float]]
    missing: float
    plain_missing: float
    elsewhere: dict[str, float]

    def table(self) -> str:
        rows = [[name, *(f"{value:.4f}" for value in values)] for name, values in self.layers.items()]
        rows.append(["all", f"{self.missing:.4f}", f"{self.plain_missing:.4f}", ""])
        head = ["layer", "missing of the update", "by plain SVD", "relative to W'"]
        lines = aligned(head, rows)
        if self.elsewhere:
            shown = listed([f"{name} ({100 * change:.2g} %)" for name, change in self.elsewhere.items()], 4)
            lines.append(f"not in the adapter, though changed: {shown}; --also_train NAME stores a module whole")
        return "\n".join(lines)

    def to_dict(self) -> dict:
        names = ("missing", "plain_missing", "relative_to_tuned")
        layers = {name: dict(zip(names, values)) for name, values in self.layers.items()}
        return {"missing": self.missing, "plain_missing": self.plain_missing, "layers": layers, "elsewhere": self.elsewhere}


def extract(
    base: str,
    tuned: str,
    output: str | Path,
    rank: int = 64,
    targets: str | list[str] = "all-linear",
    also_train: list[str] = (),
    overwrite: bool = False,
    done: Callable[[int], None] = lambda count: None,
) -> Extraction:
    """Write the adapter folder `output`, whole or not at all.

    Args:
        base, tuned: hub ids or folders of safetensors, of one architecture and vocabulary.
        targets: which layers, as AdapterConfig has it; also_train: modules that are stored whole as they are tuned.
        done: called after each layer.

    Raises:
        UserError: the two do not fit each other, a target that is a batch of matrices, values that are not finite.
    """
    refuse_existing(Path(output), overwrite)
    theirs = Weights(tuned)
    model = load_model(base, _dtype(Weights(base).folder))
    keys = matching_keys(model, theirs, tuned)
    elsewhere = dict(_changed(model, theirs, keys))
    targets = tuple(targets) if isinstance(targets, list) else targets
    attach(model, _config(model, AdapterConfig(rank=rank, alpha=rank, targets=targets, also_train=tuple(also_train))))
    fits: dict[str, LowRankFit] = {}
    for name, layer in adapters(model):
        fits[name] = _fitted(name, layer, theirs, keys, rank)
        done(1)
    whole = _take_whole(model, also_train, theirs, keys)
    covered = {keys[f"{name}.{kind_of(layer).weight_name}"] for name, layer in adapters(model)} | whole
    rest = {key: change for key, change in elsewhere.items() if key not in covered}
    missing, plain, update = (sum(getattr(f, n) ** 2 for f in fits.values()) ** 0.5 for n in ("missing", "plain_missing", "update"))
    layers = {name: (f.relative, f.plain_relative, f.missing / f.norm if f.norm else 0.0) for name, f in fits.items()}
    result = Extraction(Path(output), layers, missing / (update or 1.0), plain / (update or 1.0), rest)
    with new_folder(Path(output), overwrite) as folder:
        save(model, folder)
        write_json(folder / "extraction.json", {"tuned": tuned, "rank": rank} | result.to_dict())
    return result


def _config(model: nn.Module, config: AdapterConfig) -> AdapterConfig:
    """With the full rank in layers that have no more."""
    modules = dict(named_layers(model))
    sizes = {name: min(kind_of(m).base(m).shape(m)[-2:]) for name, m in modules.items() if kind_of(m) is not None}
    ranks = select(model, replace(config, rank=1)).ranks
    return replace(config, rank_overrides={name: sizes[name] for name in ranks if sizes[name] < config.rank})


def _dtype(folder: Path) -> str:
    config = read_json(folder / "config.json", "a model folder needs it")
    return config.get("dtype") or config.get("torch_dtype") or "float32"


def matching_keys(model: nn.Module, theirs: Weights, tuned: str) -> dict[str, str]:
    """{parameter: key in the tuned checkpoint}, of the same shapes.

    Raises:
        UserError: what is missing there, or of another shape.
    """
    shapes, prefix = theirs.shapes(), getattr(model, "base_model_prefix", "")
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    keys, problems = {}, []
    for name, p in model.named_parameters(remove_duplicate=False):
        spellings = [s for n in (name, *names[id(p)]) for s in (n, n.removeprefix(prefix + "."), f"{prefix}.{n}")]
        key = next((s for s in spellings if s in shapes), None)
        if key is None:
            problems.append(f"{name} is missing")
        elif shapes[key] != tuple(p.shape):
            problems.append(f"{key} has shape {shapes[key]}, the base {tuple(p.shape)}")
        else:
            keys[name] = key
    if problems:
        raise UserError(f"{tuned} is not a fine-tuned form of this base: {listed(problems)}")
    return keys


@torch.no_grad()
def _changed(model: nn.Module, theirs: Weights, keys: dict[str, str]) -> Iterator[tuple[str, float]]:
    """(key, |change|/|W|) of every tensor that is another one in the tuned model, the largest change first."""
    parameters, changes = dict(model.named_parameters()), {}
    for name, p in parameters.items():
        before, after = p.float(), theirs.stored(keys[name]).float()
        if not torch.isfinite(after).all():
            raise UserError(f"{theirs.base}: {keys[name]} holds NaN or infinite values; there is nothing to extract")
        if change := (after - before).norm().item():
            changes[keys[name]] = change / (before.norm().item() or 1.0)
    yield from sorted(changes.items(), key=lambda item: -item[1])


@torch.no_grad()
def _fitted(name: str, layer: nn.Module, theirs: Weights, keys: dict[str, str], rank: int) -> LowRankFit:
    """LowRankFit one layer and put the result into its parameters."""
    kind = kind_of(layer)
    if kind.stacked:
        raise UserError(f"{name} is a batch of expert matrices, which extraction does not fit; leave it out of --targets")
    weight = layer.get_parameter(kind.weight_name)
    W, tuned = (kind.matrix(t.detach().float()).flatten(1) for t in (weight, theirs.stored(keys[f"{name}.{kind.weight_name}"])))
    result = fit(W, tuned, rank)
    R = len(result.A)  # fewer than asked for where the matrix has no more
    layer.lora_A.zero_()[:R] = result.A
    layer.lora_B.zero_()[:, :R] = result.B * (1 / layer.adapted.scaling)
    layer.magnitude.copy_(result.m)
    return result


@torch.no_grad()
def _take_whole(model: nn.Module, also_train: list[str], theirs: Weights, keys: dict[str, str]) -> set[str]:
    """Modules stored whole get the tuned values; returns their keys."""
    taken = set()
    for name, p in model.named_parameters(remove_duplicate=False):
        owner, _, last = name.rpartition(".")
        if name in keys and any(owner == entry or owner.endswith("." + entry) for entry in also_train):
            p.copy_(theirs.stored(keys[name]))
            taken.add(keys[name])
    return taken
