"""Base weights that a PEFT folder holds beside its adapter, and layers whose weight is tied to another's.

    <layer>.base_layer.weight           of an adapted embedding or head: PEFT writes the frozen weight along
    <embedding or head>.weight          where the vocabulary was resized

Equal to the model's own: nothing is to be done. Other values of the same shape take the place of the model's, as in PEFT; the
original parameters are remembered, and `detach` gives them back. An adapted layer that shares its weight with another one gets a
weight of its own, as PEFT computes. Cost: one comparison; a copy of each weight that differs or is tied.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..adapter.targets import memory_of
from ..errors import UserError
from ..layers import kind_of
from ..layers.layouts import layer_at
from ..layers.shares import gathered, is_share
from ..layers.wrappers import module_at, named_modules, named_parameters
from .tensors import Key

INNER = ".base_layer"


def split(model: nn.Module, layers, also_train, tensors: dict[Key, Tensor]) -> tuple[dict[str, Tensor], dict[Key, Tensor]]:
    """({path of a parameter in the model: its values in the file}, all other tensors); layers: names of adapted modules."""
    embeddings = {name for name, module in named_modules(model) if any(module is each for each in vocabulary(model))}
    base, rest = {}, {}
    for key, t in tensors.items():
        owner, _, leaf = key[1].rpartition(".")
        inner = owner.removesuffix(INNER)
        held = inner in layers if owner.endswith(INNER) else owner in embeddings - set(layers) - set(also_train)
        if not key[0] and held and leaf in _own(model, inner):
            base[f"{inner}.{leaf}"] = t
        else:
            rest[key] = t
    return base, rest


def vocabulary(model: nn.Module) -> list[nn.Module]:
    """The input embedding and the output head, where the model says which they are."""
    modules = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            modules.append(getattr(model, name)())
        except (AttributeError, NotImplementedError, TypeError):
            continue
    return [module for module in modules if isinstance(module, nn.Module)]


def _own(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    try:
        return {key: p for key, p in module_at(model, name)._parameters.items() if p is not None}
    except AttributeError:
        return {}


def problems(model: nn.Module, base: dict[str, Tensor]) -> list[str]:
    """Why these base weights cannot be the model's."""
    wrong = []
    for path, t in base.items():
        name, _, leaf = path.rpartition(".")
        p = _own(model, name)[leaf]
        if t.shape == p.shape:
            if not p.is_floating_point() and not p.is_meta and not torch.equal(p.detach().cpu(), t):
                wrong.append(f"{path} is quantized otherwise in the file than in the model")
            continue
        reason = f"the file holds {path} with shape {tuple(t.shape)}, the model's has {tuple(p.shape)}"
        resized = hasattr(model, "resize_token_embeddings") and t.shape[1:] == p.shape[1:]
        wrong.append(reason + (f"; call model.resize_token_embeddings({len(t)}) before loading" if resized else ""))
    return wrong


def differing(model: nn.Module, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those whose values, in the model's dtype, are not the model's."""
    found = {}
    for path, t in base.items():
        name, _, leaf = path.rpartition(".")
        p = _own(model, name)[leaf]
        if p.is_floating_point() and not torch.equal(t.to(p.device, p.dtype), gathered(p).detach()):
            found[path] = t
    return found


def tied(model: nn.Module, layers) -> dict[str, list[str]]:
    """Path of an adapted layer's weight → the paths of others that are the same parameter."""
    owners: dict[int, list[str]] = {}
    for path, p in named_parameters(model, remove_duplicate=False):
        owners.setdefault(memory_of(p), []).append(path)
    paths = [kind_of(layer_at(model, name)).key(name) for name in layers]
    same = {path: p for path, p in named_parameters(model, remove_duplicate=False) if path in paths}
    return {path: others for path, p in same.items() if (others := [o for o in owners[memory_of(p)] if o != path])}


def sharing(model: nn.Module, names, others: set[str]) -> list[str]:
    """Modules among `others` whose weight is the very parameter of a module among `names`."""
    weights = {memory_of(p) for name in names for p in _own(model, name).values()}
    return sorted(other for other in others if any(memory_of(p) in weights for p in _own(model, other).values()))


@torch.no_grad()
def put_in(model: nn.Module, base: dict[str, Tensor], layers) -> dict[str, nn.Parameter]:
    """Give the model these base weights, and tied adapted layers weights of their own; the original parameters by path."""
    originals = {}
    for path in [*differing(model, base), *tied(model, layers)]:
        name, _, leaf = path.rpartition(".")
        module = module_at(model, name)
        if path not in originals:
            p = originals[path] = module._parameters[leaf]
            if is_share(p):
                raise UserError(f"{path} gets a value of its own from the file; load the adapter first, then call fully_shard")
            values = base.get(path, p.detach()).to(p.device, p.dtype, copy=True)
            module._parameters[leaf] = nn.Parameter(values, requires_grad=p.requires_grad)
    return originals


def base_tensors(model: nn.Module, record) -> dict[str, Tensor]:
    """What a file must hold of them, as PEFT writes it; of a merged layer its weight from before.

    Raises:
        UserError: merged with keep="none".
    """
    held = {}
    for path in record.base:
        name, _, leaf = path.rpartition(".")
        stored = (record.merged or {}).get(name)
        adapted = name in record.names
        if stored is not None and stored.original is None:
            raise UserError(f'{path} came with the adapter and was merged with keep="none"; save before merging')
        merged = stored is not None and leaf == stored.adapted.kind.weight_name
        t = stored.original if merged else module_at(model, name)._parameters[leaf]
        held[f"{name}{INNER * adapted}.{leaf}"] = gathered(t).detach().clone()
    return held


def take_out(model: nn.Module, originals: dict[str, nn.Parameter]) -> None:
    """Undo `put_in`."""
    for path, p in originals.items():
        name, _, leaf = path.rpartition(".")
        module_at(model, name)._parameters[leaf] = p
