"""Merge in memory: W' = g ⊙ (W + s·B·A) takes W's place (Eq. 5), the layer becomes an ordinary layer, and back, bit for bit; or for
good, and the model is an ordinary one (`states.py`).

A quantized layer becomes an nn.Linear with a dense weight, made from its dequantized rows; its packed tensors are kept.

Cost: 2·O·I·R FLOPs in fp32, in row tiles of 4 MiB; with `keep`, one exact copy of each adapted weight.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..layers import fastpath
from ..layers.adapted import Adapted, is_adapted, own_parameters
from ..layers.fsdp import reshard
from ..layers.layouts import layer_at
from ..layers.shares import at_hand, is_share
from ..layers.watch import put_hooks, take_hooks
from ..layers.weight import AdaptedWeight
from ..layers.wrappers import unwrapped
from ..math.autograd import no_autocast
from ..math.dora import dora
from . import guards
from . import whole as trained_whole
from .attach import adapters, record_of
from .elsewhere import refuse_unwritable
from .foreign import refuse_foreign
from .layer import put_on, refuse_altered, take_off
from .states import refuse_others_aside, settle
from .stored import Stored

KEEP = ("cpu", "device", "none")
QUANTIZED = ("dense", "same")


@torch.no_grad()
def merge(model: nn.Module, keep: str = "cpu", quantized: str = "dense") -> int:
    """Put the merged weights in place; layers become plain layers with zero added latency.

    Args:
        keep: where the bit-exact copy of each original weight lives: "cpu", "device", or "none" (the model is an ordinary one then:
            nothing is frozen that was not, and it may get another adapter; unmerge refuses).
        quantized: what becomes of a quantized layer: "dense" (an ordinary nn.Linear in the model's dtype) or "same" (quantized
            again as it was, which rounds the merged weight: the output is no longer exactly the adapted model's).

    Returns:
        Bytes of the kept copies.

    Raises:
        UserError: nothing attached, merged already, a weight that would not be finite, a storage that "same" does not know
            (nothing is then changed).
    """
    for name, value, known in (("keep", keep, KEEP), ("quantized", quantized, QUANTIZED)):
        if value not in known:
            raise UserError(f"{name} is {value!r}; expected one of {', '.join(known)}")
    record, model = record_of(model), unwrapped(model)
    if record.merged is not None:
        again = "it has no adapter any more" if record.for_good else "call doratune.unmerge(model) first"
        raise UserError(f"this model is merged already; {again}")
    if keep == "none":
        refuse_others_aside(model)
    record.registry.find_shares(model)
    trained_whole.check(model)
    layers, merged = list(adapters(model)), {}
    refuse_altered(layers, "merged")
    refuse_unwritable(layers)
    refuse_foreign(model, "doratune.merge")
    seen = {name: module.adapted.factors for name, module in layers}
    for _, module in layers:
        module.adapted.changed()  # also after an edit that announced itself to nobody
    if quantized == "same":
        _check_storages(layers)
    common = model_dtype(model, layers)
    with no_autocast(next(model.parameters()).device):
        dtypes = {name: merged_dtype(module, common, quantized, seen[name]) for name, module in layers}
        norms = {name: checked_norms(name, module, dtypes[name]) for name, module in layers}
        try:
            for name, module in layers:
                merged[name] = _merge_layer(module, norms[name], keep, quantized, dtypes[name])
        except BaseException:
            for name, stored in merged.items():
                if stored.original is not None:
                    _restore(layer_at(model, name), stored)
            raise
    record.merged, record.wide = merged, trained_whole.narrow(model)
    take_hooks(model)
    guards.take_off(model)
    fastpath.reopen(model)
    if record.for_good:
        settle(model, record)
    return sum(stored.original.nbytes for stored in merged.values() if stored.original is not None)


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Restore the original weights bit for bit and the adapter as it was; a move or dtype change meanwhile is kept, but
    for the dtype that a quantized layer computes in.

    Raises:
        UserError: not merged, or merged with keep="none".
    """
    record, model = record_of(model), unwrapped(model)
    if record.merged is None:
        raise UserError("this model is not merged; there is nothing to unmerge")
    if any(stored.original is None for stored in record.merged.values()):
        raise UserError('merged with keep="none": no original weight was kept; load the base model again')
    refuse_foreign(model, "doratune.unmerge")
    reshard(model)
    layers = {name: layer_at(model, name) for name in record.merged}
    refuse_altered([(name, layer, record.merged[name].adapted) for name, layer in layers.items()], "unmerged")
    for name, stored in record.merged.items():
        _restore(layers[name], stored)
    trained_whole.widen(model, record.wide)
    record.merged, record.wide = None, {}
    put_hooks(model, record.registry, is_adapted)
    guards.put_on(model)
    fastpath.close(model)


def checked_norm(name: str, weight: AdaptedWeight, dtype: torch.dtype | None = None) -> Tensor | None:
    """|W + s·B·A| of a weight whose merged form is finite in `dtype` (default: the base's); None without a magnitude.

    Raises:
        UserError: NaN or infinite values in the adapter, or a result beyond the weight's dtype (fp16).
    """
    n = weight.n() if weight.magnitude else None
    if any(not torch.isfinite(t).all() for t in (n, weight.m(), *weight.tensors()) if t is not None):
        raise UserError(f"{name}: the adapter holds NaN or infinite values; merging is refused, nothing was changed")
    dtype = dtype or weight.dtype
    if dtype == torch.float16 and not all(torch.isfinite(tile.to(dtype)).all() for _, tile in merged_tiles(weight, n)):
        raise UserError(f"{name}: the merged weight overflows float16; merging is refused, nothing was changed: use bfloat16")
    return n


def checked_norms(name: str, module: Adapted, dtype: torch.dtype) -> list[Tensor | None]:
    """`checked_norm` of each matrix of a layer."""
    with at_hand(module):
        return [checked_norm(name, part, dtype) for part in module.adapted.matrices()]


def _merge_layer(module: Adapted, norms: list[Tensor | None], keep: str, quantized: str, dtype: torch.dtype) -> SimpleNamespace:
    """Write one layer's merged weight and make it a plain layer; returns its stored adapter."""
    weight = module.adapted
    frozen, base = weight.facts.directionless, weight.base
    seen = {"lora_A": module.lora_A, "lora_B": module.lora_B, "magnitude": module.magnitude}
    if base.writable:
        leaf = weight.kind.leaf(module)
        with at_hand(module, names=()):
            W = weight.stored().detach()
            W = W.to_local() if is_share(W) else W
            original = None if keep == "none" else W.to("cpu", copy=True) if keep == "cpu" else W.clone()
        with at_hand(module, write=(leaf,)):
            for part, n in zip(weight.matrices(), norms, strict=True):
                for rows, tile in merged_tiles(part, n):
                    part.base.write_rows(part.layer, rows, tile)
        own = take_off(module)
    else:
        W = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        for rows, tile in merged_tiles(weight, norms[0]):
            W[rows] = tile.to(dtype)
        own = take_off(module)
        original = Stored(module)
        try:
            base.requantized(module, W) if quantized == "same" else original.make_dense(module, W)
        except BaseException:
            original.restore(module)
            put_on(module, weight, own)
            raise
        original = None if keep == "none" else original.to("cpu") if keep == "cpu" else original
    return SimpleNamespace(**(seen | own), own=own, scaling=weight.scaling, adapted=weight, original=original, frozen=frozen)


def _restore(module: nn.Module, stored: SimpleNamespace) -> None:
    """Undo `_merge_layer`; where the model changed its dtype meanwhile, the original weight and m follow as `.to` does."""
    base, dtype = stored.adapted.base, None
    if base.writable:
        device, dtype = _put_original(module, stored)
    else:
        device = stored.original.restore(module)
    for p in stored.own.values():
        if p is not None and not (p.is_meta or is_share(p)):
            p.data = p.data.to(device)
    put_on(module, stored.adapted, stored.own)
    stored.adapted.changed()
    if base.writable and dtype != stored.original.dtype:
        stored.adapted.kind.home(module).to(dtype)


def _put_original(module: nn.Module, stored: SimpleNamespace) -> tuple[torch.device, torch.dtype]:
    """Put the original weight, or this process's part of it, where the merged one is; the device and dtype of that."""
    kind = stored.adapted.kind
    home, leaf = kind.home(module), kind.leaf(module)
    with at_hand(module, names=(), write=(leaf,)), at_hand(home, names=(), write=(leaf,)):
        weight = home._parameters[leaf]
        device, dtype = weight.device, weight.dtype
        if is_share(weight):
            weight.detach().to_local().copy_(stored.original)
        elif dtype == stored.original.dtype and device.type != "meta":
            weight.copy_(stored.original)
        else:
            weight.data = stored.original.to(device)
    return device, dtype


def _check_storages(layers: list) -> None:
    """Every quantized layer must know the way back into its storage."""
    for name, module in layers:
        base = module.adapted.base
        if not base.writable and (problem := base.requantize_refusal(module)):
            raise UserError(f'{name}: cannot be quantized again, {problem}; merge with quantized="dense"')


def model_dtype(model: nn.Module, layers: list) -> torch.dtype | None:
    """The dtype in which the model computes: that of its largest plain parameter besides the adapters' own, or None."""
    adapters_own = {id(p) for _, module in layers for p in own_parameters(module).values()}
    plain = [p for p in model.parameters() if id(p) not in adapters_own and type(p) is nn.Parameter and p.is_floating_point()]
    plain = [p for p in plain if type(p.data) is Tensor and p.dtype.itemsize >= 2]
    if not plain:
        return None
    largest = max(plain, key=Tensor.numel)
    return trained_whole.compute_dtypes(model).get(id(largest), largest.dtype)


def merged_dtype(module: Adapted, common: torch.dtype | None, quantized: str, seen) -> torch.dtype:
    """Of a merged weight: the base's own where it is stored as before, else what the layer's inputs will be in; seen: the factors
    of its last call, if it was called."""
    base = module.adapted.base
    if base.writable or quantized == "same":
        return base.dtype(module)
    return common or (seen.low if seen is not None else base.model_dtype(module) or torch.get_default_dtype())


@torch.no_grad()
def merged_tiles(weight: AdaptedWeight, n: Tensor | None):
    """(rows, W' rows in fp32) tile by tile: `math.dora.dora` on A and B as the unmerged forward in W's dtype rounds them."""
    low, m, frozen = weight.dtype, weight.m(), weight.facts.frozen
    wide = torch.float64 if low == torch.float64 else torch.float32
    A, B = (None if t is None else t.to(low).to(wide) for t in weight.low_rank())
    if frozen is not None and m is not None:  # W' = V on rows without direction
        m, n = m.masked_fill(frozen, 1.0), n.masked_fill(frozen, 1.0)
    for rows, tile_KI in weight.row_tiles():
        B_K = None if B is None else B[rows]
        if m is None or weight.axis == "input":
            yield rows, dora(tile_KI, A, B_K, m, weight.scaling, weight.axis, n)
        else:
            yield rows, dora(tile_KI, A, B_K, m[rows], weight.scaling, weight.axis, n[rows])
