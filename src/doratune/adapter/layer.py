"""One layer: adapted in place, and a plain one again with its own parameters kept aside.

Cost: one pass over the layer's weight for w² (m starts there), and R·(I + O) + O numbers.
"""

from __future__ import annotations

import zlib

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..bases import accumulation_dtype
from ..config import AdapterConfig
from ..directions import Direction, direction_for
from ..errors import UserError, listed
from ..layers import fsdp, kind_of
from ..layers.adapted import MAGNITUDE, Adapted, adapted_class, become, own_parameters, start_again
from ..layers.magnitude import MAGNITUDES
from ..layers.offload import offloaded, take_along
from ..layers.registry import Registry
from ..layers.shares import at_hand, is_share
from ..layers.weight import AdaptedWeight
from . import start as initial
from .base_norms import RowNorms, row_norms, spread
from .whole import Whole, keep_whole_wide


class Common:
    """What the layers of one attachment share."""

    def __init__(self, registry: Registry, config: AdapterConfig, shapes=(), overwritten=False, original=None, loading=False):
        self.registry, self.config, self.shapes, self.overwritten = registry, config, list(shapes), overwritten
        self.original = original
        self.loading = loading  # the values come from a file afterwards
        self.norm_memory = config.norm_memory  # bytes left for products that are kept
        self.directions: dict[bool, Direction] = {}
        self.shares: dict[tuple[int, str], fsdp.Share] = {}  # of a model in shards
        self.measured, self.adapted = spread(len(self.shapes)), 0

    def norms(self, base, module: nn.Module) -> RowNorms | None:
        """Of some layers, spread over the order in which they are adapted, what tells their base again."""
        self.adapted += 1
        return row_norms(base, module) if self.adapted - 1 in self.measured else None

    def direction(self, rank: int) -> Direction:
        """The one direction of all layers with a rank, and that of all without."""
        if bool(rank) not in self.directions:
            self.directions[bool(rank)] = direction_for(self.config, rank, self.shapes)
        return self.directions[bool(rank)]

    def may_keep(self, weight: AdaptedWeight, module: nn.Module) -> bool:
        """Is there memory left for this layer's U = W·Aᵀ, where A never changes?"""
        shape = weight.base.shape(module)
        if not weight.direction.constant_A() or not weight.magnitude or weight.axis != "output" or len(shape) > 2:
            return False
        wanted = shape[0] * weight.rank * weight.base.dtype(module).itemsize + 4 * weight.rank**2
        if wanted > self.norm_memory:
            return False
        self.norm_memory -= wanted
        return True


def adapt(
    module: nn.Module, name: str, config: AdapterConfig, rank: int, alpha: float, trainable: bool, common: Common | None = None
) -> None:
    """Adapt one module in place; rank 0 trains the magnitude alone."""
    kind = kind_of(module)
    base = kind.base(module)
    base.trial(module)
    base.adopt(module)
    common = common or Common(Registry(), config, [base.shape(module)[-2:]])
    weight = kind.weight(
        kind=kind,
        base=base,
        direction=common.direction(rank),
        rank=rank,
        scaling=config.scaling(rank, alpha) if rank else 1.0,
        magnitude=config.has_magnitude,
        axis=kind.axis(config),
        full_gradient=config.norm_gradient == "full",
        relative=config.magnitude_form == "relative",
        dropout=config.dropout,
        registry=common.registry,
        overwritten=common.overwritten,
    )
    weight.keep_product = common.may_keep(weight, module)
    weight.base_norms = common.norms(base, module)
    seed = (config.seed << 32) + zlib.crc32(name.encode())
    module.adapted = weight
    weight.belongs_to(module)
    try:
        _create(module, weight, config, seed, name, common)
    except BaseException:
        for key in (*weight.direction.names, "lora_A", "lora_B", *MAGNITUDES[False], *MAGNITUDES[True]):
            module._parameters.pop(key, None)
        base.release(module)
        del module.adapted
        raise
    frozen = never_trained(weight)
    for key, p in own_parameters(module).items():
        p.requires_grad_(trainable and key not in frozen)
    become(module, adapted_class(type(module), weight.magnitude and weight.relative))
    kind.joined(module)
    home = kind.home(module)
    if share := common.shares.get((id(home), kind.leaf(module))):
        fsdp.join(module, list(own_parameters(module)), share)
    elif offloaded(module):
        take_along(module, list(own_parameters(module)))


def never_trained(weight: AdaptedWeight) -> tuple[str, ...]:
    """Names of its parameters that stay as they are."""
    return (*weight.direction.frozen, "magnitude_start")


def _create(module: nn.Module, weight: AdaptedWeight, config: AdapterConfig, seed: int, name: str, common: Common) -> None:
    """Register the direction's parameters and the magnitude, with their first values."""
    dtype, device = accumulation_dtype(weight.base.dtype(module)), weight.base.device(module)
    weight.create(module, seed, dtype, device)
    for key in ("lora_A", "lora_B"):
        if key not in module._parameters:
            module.register_parameter(key, None)
    if common.loading:
        first = weight.facts.w2.sqrt() if weight.magnitude else None
    else:
        first = initial.of_layer(weight, config, seed, name, common.original)
    relative = weight.magnitude and weight.relative
    values = (torch.zeros_like(first), first) if relative else (first,)
    for key, value in zip(MAGNITUDES[relative], values, strict=True):
        module.register_parameter(key, nn.Parameter(value) if weight.magnitude else None)


def altered(module: nn.Module, weight: AdaptedWeight) -> str | None:
    """What was done to a layer since it was adapted (or merged) that hides its parameters, and what takes it off again; None:
    nothing."""
    if parametrize.is_parametrized(module):
        names = ", ".join(repr(name) for name in module.parametrizations)
        return f"parametrized ({names}): call torch.nn.utils.parametrize.remove_parametrizations(layer, {names}) first"
    if isinstance(module, Adapted):
        expected = adapted_class(type(module).plain_class, weight.magnitude and weight.relative)
        if type(module) is not expected:
            return f"its class was changed to {type(module).__name__}: give it back the class that it had"
    held = {weight.kind.leaf(module): weight.kind.home(module)} if weight.base.writable else {}
    held |= dict.fromkeys(weight.names, module) if isinstance(module, Adapted) else {}
    hidden = [name for name, owner in held.items() if name not in owner._parameters]
    if hidden:
        return f"its {hidden[0]} is no parameter any more: {_undone_by(module, hidden[0])} first"
    return None


def _undone_by(module: nn.Module, name: str) -> str:
    """The call that takes off what computes this tensor before each forward."""
    calls = {
        "WeightNorm": f"call torch.nn.utils.remove_weight_norm(layer, {name!r})",
        "SpectralNorm": f"call torch.nn.utils.remove_spectral_norm(layer, {name!r})",
        "BasePruningMethod": f"call torch.nn.utils.prune.remove(layer, {name!r})",
    }
    hooks = [cls.__name__ for hook in module._forward_pre_hooks.values() for cls in type(hook).__mro__]
    return next((call for hook, call in calls.items() if hook in hooks), "make it one again")


def refuse_altered(layers, done: str) -> None:
    """Raise where a layer cannot be taken as it was adapted; layers: (name, layer) or (name, layer, weight), nothing is touched.

    Raises:
        UserError: a weight norm, a parametrization or a pruning was put on, with the call that takes it off.
    """
    problems = [(name, altered(layer, *(weight or [layer.adapted]))) for name, layer, *weight in layers]
    if problems := [f"{name} cannot be {done}: {problem}" for name, problem in problems if problem]:
        raise UserError(listed(problems, 3))


def take_off(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Make an adapted module a plain one again; returns its own parameters."""
    weight = module.adapted
    names = (*weight.names, "lora_A", "lora_B", "magnitude")
    own = {name: module._parameters.pop(name) for name in dict.fromkeys(names) if name in module._parameters}
    weight.base.release(module)
    fsdp.leave(weight)
    del module.adapted
    become(module, type(module).plain_class)
    weight.kind.left(module)
    return own


def put_on(module: nn.Module, weight: AdaptedWeight, own: dict[str, nn.Parameter | None]) -> None:
    """Undo `take_off`."""
    for name, p in own.items():
        module.register_parameter(name, p)
    module.adapted = weight
    weight.belongs_to(module)
    fsdp.rejoin(weight)
    weight.base.adopt(module)
    become(module, adapted_class(type(module), weight.magnitude and weight.relative))
    weight.kind.joined(module)


def untouched(layer: nn.Module) -> bool:
    """ΔV = 0 and m = w: the layer's adapter has not been trained."""
    with at_hand(layer):
        return all(_untouched(part) for part in layer.adapted.matrices())


def _untouched(weight) -> bool:
    A, B = weight.low_rank()
    if A is not None and bool((A.any(1) & B.any(0)).any()):
        return False
    m = weight.m()
    return m is None or bool((m == weight.facts.w2.sqrt().to(m.dtype)).all())


@torch.no_grad()
def keep_wide(model: nn.Module) -> None:
    """What is trained in fp32 again, where somebody gave it other data (`p.data = p.data.to(torch.bfloat16)`): the very parameters,
    and magnitudes that were at the start are the norms again.

    Raises:
        UserError: trained magnitudes were rounded.
    """
    for name, module in model.named_modules():
        if isinstance(module, Whole):
            keep_whole_wide(module)
        if not isinstance(module, Adapted):
            continue
        weight, own = module.adapted, own_parameters(module)
        before = {name: p.dtype for name, p in own.items()}
        if set(before.values()) == {accumulation_dtype(weight.base.dtype(module))}:
            continue
        follow(module, weight, own)
        weight.changed()
        if MAGNITUDE in own and own[MAGNITUDE].dtype != before[MAGNITUDE] and not start_again(module, before[MAGNITUDE]):
            rounded = f"the trained m of {name} was rounded to {str(before[MAGNITUDE]).removeprefix('torch.')}"
            raise UserError(f"{rounded}, as TRL does over a quantized base; load the adapter anew and give doratune.as_peft(model)")


def follow(module: nn.Module, weight: AdaptedWeight, own: dict[str, nn.Parameter | None]) -> None:
    """Bring an adapter's own parameters to where its layer is now, in fp32 (fp64 over an fp64 base)."""
    device, wide = weight.base.device(module), accumulation_dtype(weight.base.dtype(module))
    for p in own.values():
        if p is not None and not is_share(p) and (p.device, p.dtype) != (device, wide):
            p.data = p.data.to(device, wide)
            p.grad = None if p.grad is None else p.grad.to(device, wide)
