"""Weights that are whole in their module only while it runs: shards of FSDP2, parts of ZeRO-3, and what accelerate offloads.

    fully_shard                    a DTensor, this process's share, stands in the module; for a forward and a backward a whole copy
                                   stands in its place, at another address each time
    ZeRO-3                         an empty tensor stands there, with this process's part as an attribute (`zero3.py`)
    cpu_offload, disk_offload      a tensor on the meta device stands there; for a forward a copy from the CPU or the disk

What is derived from a weight (w², factors) is kept under its share, never under the copies: it is made once, not once a copy.
A call has whole tensors, which were fetched for the base's own product: its norm sends nothing. Between calls

    w²          of this process's rows, then one all-gather of O numbers; of its columns, then one all-reduce of O numbers
    at_hand     whole tensors of one layer, for what looks at one layer after the other (save, verify, merge)

A mixed-precision policy casts W; A, B and m stay fp32, or the norm's rounding would be larger than a training step. w² is then that
of W as it is stored, so that g = 1 at the start. All of this is asked in the same order by every process.
"""

from __future__ import annotations

import contextlib
import sys

import torch
from torch import Tensor, nn

from ..bases import accumulation_dtype
from ..errors import UserError
from ..math import decomposition
from . import zero3
from .fsdp import TWICE, fsdp_modules, keep_wide, shares_of
from .offload import Offloaded, loaded, offloaded


def is_share(t) -> bool:
    """Is it a tensor of which this process has a part?"""
    cls = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return cls is not None and isinstance(t, cls)


def whole(t: Tensor) -> bool:
    """Has it all of its numbers here?"""
    return not (t.is_meta or is_share(t) or zero3.in_parts(t))


def gathered(t: Tensor | None) -> Tensor | None:
    """All of a tensor, on the device of its share; every process asks. Of others, the tensor itself."""
    if not is_share(t):
        return t
    device, mesh = t.to_local().device, t.device_mesh.device_type
    with torch.no_grad():
        return (t.detach() if device.type == mesh else t.detach().to(mesh)).full_tensor().to(device)


def put_into_share(share: Tensor, value: Tensor) -> None:
    """Write this process's part of a whole tensor into its share; nothing is sent."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = share.device_mesh
    spread = DTensor.from_local(value.to(mesh.device_type), mesh, [Replicate()] * mesh.ndim, run_check=False)
    share.to_local().copy_(spread.redistribute(placements=share.placements).to_local())


def put_value(t: Tensor, value: Tensor) -> None:
    """Write a whole tensor into a parameter, or this process's part of it into its share."""
    if is_share(t):
        put_into_share(t.detach(), value.to(t.dtype))
    else:
        t.detach().copy_(value)


FSDP = "_is_fsdp_managed_module"
MARKS = (FSDP, "_hf_hook", zero3.MARK)
"""Attributes of a module that FSDP, accelerate and DeepSpeed leave there."""


class Search:
    """Which weights of an attachment an engine may have by now: a look at the attributes of each layer, once a forward."""

    def __init__(self):
        self.attributes: list[dict] | None = None
        self.lost = 0  # weights under an engine of which no share was found

    def begin(self) -> None:
        """Layers were added, or may lie elsewhere."""
        self.attributes, self.lost = None, 0

    def new(self, weights, running: bool) -> list:
        """Those of `weights()` that are managed, and of which that was not known."""
        if self.attributes is None:
            self.attributes = [vars(holder_of(one).layer) for one in weights() if not one.settled]
        if not any(mark in attributes for attributes in self.attributes for mark in MARKS):
            return []
        new = [one for one in weights() if not (one.settled if running else one.shares) and managed(one)]
        return [] if running and len(new) == self.lost else new

    def end(self, new: list, running: bool) -> None:
        """They were looked for."""
        self.lost, self.attributes = sum(not one.settled for one in new) if running else 0, None


def managed(weight) -> bool:
    """Is an adapted weight whole only while its layer runs?"""
    return managed_module(holder_of(weight).layer)


def managed_module(module: nn.Module) -> bool:
    return FSDP in vars(module) or zero3.MARK in vars(module) or offloaded(module)


def find(weights: list, model: nn.Module, running: bool) -> None:
    """Tell weights where their tensors' own numbers are, as far as it is known from this model; every process asks. running: its
    forward has begun, so that it is known what a policy casts."""
    under_fsdp = shares_of(model)
    for weight in weights:
        holder = holder_of(weight)
        layer, leaf = holder.layer, holder.kind.leaf(holder.layer)
        places = {name: (layer, name) for name in (*holder.names, holder.kind.bias_name)} | {leaf: (holder.kind.home(layer), leaf)}
        if any(offloaded(module) for module, _ in places.values()):
            weight.shares = {name: Offloaded() for name in places}
        else:
            if weight.split is not None and under_fsdp:
                raise UserError(f"{weight.kind.name} layers are {TWICE}")
            known = {name: under_fsdp.get((id(module), key)) for name, (module, key) in places.items()}
            known |= {
                name: zero3.partition(module._parameters.get(key)) for name, (module, key) in places.items() if not known[name]
            }
            weight.shares = {name: share for name, share in known.items() if share is not None}
            weight.let_go()
    if not running:
        return
    keep_wide([share for weight in weights for name, share in weight.shares.items() if name in weight.names])
    for weight in weights:
        share, weight.settled = weight.share(), bool(weight.shares)
        if share is not None and share.cast and weight.magnitude and weight is holder_of(weight) and not weight.kind.stacked:
            weight.know(share.param.sharded_param)
    refuse_flattened([weight for weight in weights if not weight.settled])


def refuse_flattened(weights: list) -> None:
    """Raise for weights that FSDP1 made one vector with others, in which nothing has a share of its own.

    Raises:
        UserError: the layers' class is named, and what to use.
    """
    for weight in map(holder_of, weights):
        layer, W = weight.layer, weight.stored()
        tensors = [layer._parameters.get(name) for name in weight.names]
        own = None if W is None else W.untyped_storage().data_ptr()
        if W is None or any(t is None or t.untyped_storage().data_ptr() == own for t in tensors):
            raise UserError(
                f"FullyShardedDataParallel (FSDP1) flattens W, A, B and m of {weight.kind.name} layers into one vector; shard the "
                "model with torch.distributed.fsdp.fully_shard (in accelerate fsdp_version: 2)"
            )


def holder_of(weight):
    """The weight whose layer is a module: of an expert, the batch that it is in."""
    return getattr(weight, "whole", None) or weight


def squared_norms(weight, W: Tensor) -> Tensor:
    """w² (O,) or (I,) of a weight of which this process has a part, `W`: nothing but those numbers is sent."""
    return _own_part(weight, W).full_tensor().to(W.to_local().device)


def first_magnitude(weight, W: Tensor) -> Tensor:
    """m = |W| at the start. Of W in rows only this process's rows, in their places: its share of m is no more, nothing is sent."""
    part, local = _own_part(weight, W), W.to_local()
    place = own_place(part)
    if place is None:
        w2 = part.full_tensor().to(local.device)
        weight.summed = w2 if any(placement.is_partial() for placement in part.placements) else None
        return w2.sqrt()
    w = torch.zeros(part.shape, dtype=part.dtype, device=local.device)
    start, own = place[1], part.to_local()
    w[start : start + len(own)] = own.to(local.device).sqrt()
    return w


def own_place(share: Tensor) -> tuple[int, int] | None:
    """(dimension, first index in it) of this process's part of a tensor that is split once; None: it is split otherwise."""
    from torch.distributed.tensor import Shard

    mesh, split = share.device_mesh, [dim for dim, placement in enumerate(share.placements) if type(placement) is Shard]
    if len(split) != 1 or any(not p.is_replicate() for dim, p in enumerate(share.placements) if dim != split[0]):
        return None
    along = share.placements[split[0]].dim
    return along, -(-share.shape[along] // mesh.size(split[0])) * mesh.get_local_rank(split[0])


def as_sum(values: Tensor, share: Tensor) -> Tensor:
    """A tensor that is the sum of what each process has, over those among which `share` is split; nothing is sent yet."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = share.device_mesh
    placements = [Replicate() if placement.is_replicate() else Partial() for placement in share.placements]
    return DTensor.from_local(values.to(mesh.device_type), mesh, placements, run_check=False)


def _own_part(weight, W: Tensor) -> Tensor:
    """w² as a share: this process's rows, or a sum over its columns."""
    from torch.distributed.tensor import DTensor, Partial, Shard

    kind, local, along = weight.kind, W.to_local(), 0 if weight.axis == "output" else 1
    total, length = kind.matrix(torch.empty(W.shape, device="meta")).shape[along], kind.matrix(local).shape[along]
    with weight.holding(local):
        tiles = weight.row_tiles()
        w2 = decomposition.squared_norms(tiles, length, weight.axis, accumulation_dtype(W.dtype), local.device)

    def placed(placement):
        """How w² lies where W lies so: split if it grows with what is split."""
        if not isinstance(placement, Shard):
            return placement
        doubled = [2 * size if i == placement.dim else size for i, size in enumerate(W.shape)]
        return Shard(0) if kind.matrix(torch.empty(doubled, device="meta")).shape[along] != total else Partial()

    mesh, shape = W.device_mesh, torch.Size((total,))
    placements = [placed(placement) for placement in W.placements]
    return DTensor.from_local(w2.to(mesh.device_type), mesh, placements, run_check=False, shape=shape, stride=(1,))


def sharded(model: nn.Module) -> bool:
    """Is some of the model in shards?"""
    return any(is_share(p) or zero3.in_parts(p) for p in model.parameters()) or bool(fsdp_modules(model))


def first(model: nn.Module) -> bool:
    """Does this process write files? Of a model in shards, the first one does, and all of them take part."""
    return not sharded(model) or torch.distributed.get_rank() == 0


@contextlib.contextmanager
def at_hand(module: nn.Module, names: tuple[str, ...] | None = None, write: tuple[str, ...] = ()):
    """The module with whole tensors where it has shares (None: all, or those of these names) and where accelerate offloads.
    Every process comes here.

    write: of which names the values go back to where they lie."""
    adapted = vars(module).get("adapted")
    owners = dict.fromkeys((module, module if adapted is None else adapted.kind.home(module)))
    with contextlib.ExitStack() as stack:
        for owner in owners:
            stack.enter_context(loaded(owner, write))
            stack.enter_context(zero3.gathered(owner, bool(write)))
        places = [(owner, name, p) for owner in owners for name, p in owner._parameters.items() if is_share(p)]
        places = [place for place in places if names is None or place[1] in names]
        values = {}
        try:
            for owner, name, p in places:
                owner._parameters[name] = values[owner, name] = nn.Parameter(gathered(p), requires_grad=p.requires_grad)
            yield
            for owner, name, p in places:
                if name in write:
                    put_value(p, owner._parameters[name].detach())
        finally:
            for owner, name, p in places:
                if owner._parameters.get(name) is values.get((owner, name), owner):
                    owner._parameters[name] = p


@contextlib.contextmanager
def tree_at_hand(module: nn.Module):
    """`at_hand` of a module and all that is in it."""
    with contextlib.ExitStack() as stack:
        for inner in module.modules():
            stack.enter_context(at_hand(inner))
        yield
