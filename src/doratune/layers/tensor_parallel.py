"""Linear layers of which each process computes a part: the tensor-parallel plans of transformers, PyTorch's `parallelize_module`.

    rows (colwise)       this process has rows of W, of the bias and of B; A is whole in every process
    columns (rowwise)    columns of W and of A; B and the bias are whole. The plan adds up the processes' outputs

m is split where it lies along the split dimension of W, else whole. All of them are DTensors. For a call this process's own tensors
stand in their places, so the layer is an ordinary one on a part of W: its output and its gradients of x are what the plan's own
functions around it expect. The gain is linear in the output, so it may be applied to a part of a sum; the bias is added once.

What is sent, besides what the plan sends for the base; never W

    a backward    the gradients of what is whole, whose parts add up: R·I numbers of A, or O·R of B and O of m, in one all-reduce
    a norm        of rows along m nothing; else one all-reduce of 4·O numbers per change of the parameters (I on the input axis),
                  and K more for K rows whose norm cancels; w² once, O numbers

Every process comes to these at the same place: what changes parameters is called in every process.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.autograd import Function

from .kind import outside_compile
from .shares import is_share, managed_module

ROWS, COLUMNS = 0, 1
"""Dimension of W that is split."""


class Split:
    """How the weight W (O, I) of a layer is split over the processes of a mesh."""

    def __init__(self, W: Tensor):
        """W: a DTensor that `obstacle` has nothing against."""
        self.mesh, self.shape, self.dim = W.device_mesh, tuple(W.shape), W.placements[0].dim

    def __deepcopy__(self, memo):
        return self  # it is never changed, and meshes are the processes' own

    def adds_up(self, weight) -> bool:
        """Is |V| a sum over processes? Not in a layer that has whole tensors now."""
        along = ROWS if weight.axis == "output" else COLUMNS
        return along != self.dim and tuple(weight.shape) != self.shape

    def total(self, weight, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Sums over the processes, where those have other parts of the same norms."""
        return summed(self.mesh.get_group(), parts) if self.adds_up(weight) else parts

    @outside_compile
    def forward(self, layer, x: Tensor, *args, **kwargs) -> Tensor:
        """The kind's forward on this process's part. x: a DTensor, as is the output then; or this process's plain part of it, from
        and for a plan that adds up and puts the bias there itself."""
        spread = is_share(x)
        with self.in_part(layer) as parts:
            y = layer.adapted.kind.forward(layer, self.local(x) if spread else x, *args, **kwargs)
        return self.spread(y, parts.get("bias")) if spread else y

    def local(self, x: Tensor) -> Tensor:
        """This process's part of the input, or all of it."""
        from torch.distributed.tensor import Partial, Replicate, Shard

        own, grad = (Replicate(), Partial()) if self.dim == ROWS else (Shard(x.dim() - 1),) * 2
        return x.redistribute(placements=[own]).to_local(grad_placements=[grad])

    def spread(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """The output as a DTensor: these rows of it, or a part of a sum, into which the first process puts the bias."""
        from torch.distributed.tensor import DTensor, Partial, Shard

        if bias is not None and self.dim == COLUMNS:
            y = torch.add(y, bias.to(y.dtype), alpha=int(self.mesh.get_local_rank() == 0))
        shape = torch.Size((*y.shape[:-1], self.shape[0]))
        placement = Shard(y.dim() - 1) if self.dim == ROWS else Partial()
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(y, self.mesh, [placement], run_check=False, shape=shape, stride=stride)

    @contextlib.contextmanager
    def in_part(self, layer: nn.Module):
        """This process's own tensors stand in the layer, without a bias that is added after a sum; yields them by name. Of a layer
        that has plain tensors now, nothing is changed."""
        own = layer._parameters
        shares = {name: p for name, p in own.items() if is_share(p)}
        parts = {name: p.to_local() for name, p in shares.items()}
        whole = [name for name, p in shares.items() if p.requires_grad and p.placements[0].is_replicate()]
        if whole and torch.is_grad_enabled():
            parts |= zip(whole, AddedUp.apply(self.mesh.get_group(), *(parts[name] for name in whole)), strict=True)
        own.update(parts)
        if self.dim == COLUMNS and "bias" in shares:
            own["bias"] = None
        try:
            yield parts
        finally:
            own.update(shares)

    def place(self, weight, names: list[str]) -> None:
        """Split a layer's new whole parameters as W is; nothing is sent."""
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        lies = dict(zip(weight.direction.names, ((None, 1), (0, None)), strict=False))  # dimensions of A and B along O and I
        of_m = (0, None) if weight.axis == "output" else (None, 0)
        for name in names:
            p, dim = weight.layer._parameters[name], lies.get(name, of_m)[self.dim]
            share = distribute_tensor(p.detach(), self.mesh, [Replicate() if dim is None else Shard(dim)], src_data_rank=None)
            weight.layer._parameters[name] = nn.Parameter(share.clone(), requires_grad=p.requires_grad)
        weight.split, weight.plain, weight.shares = self, False, self.numbers(weight.layer)

    def numbers(self, layer: nn.Module) -> dict[str, Numbers]:
        """This process's part of each tensor of a layer, by name."""
        return {name: Numbers(layer._parameters, name) for name, p in layer._parameters.items() if is_share(p)}


class Numbers:
    """This process's part of one tensor, also while others stand in its place: the part itself in a call, or the whole tensor."""

    cast = False

    def __init__(self, holder: dict, name: str):
        self.holder, self.name, self.share = holder, name, holder[name]

    @property
    def local(self) -> Tensor:
        if is_share(p := self.holder.get(self.name)):
            self.share = p
        return self.share._local_tensor


class AddedUp(Function):
    """Tensors that are whole in every process, each of which knows a part of their gradients."""

    @staticmethod
    def forward(ctx, group, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tensors

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return None, *summed(ctx.group, grads)


def summed(group, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The sums of tensors of one dtype over a group's processes, in one all-reduce."""
    flat = torch.cat([part.reshape(-1) for part in parts])
    torch.distributed.all_reduce(flat, group=group)
    return tuple(t.view(part.shape) for t, part in zip(flat.split([part.numel() for part in parts]), parts, strict=True))


def computed_in_parts(module: nn.Module) -> bool:
    """Is this layer, adapted or not, split by a plan? What fully_shard has in shards is whole in calls."""
    return any(is_share(p) for p in module._parameters.values()) and not managed_module(module)


def obstacle(kind, module: nn.Module, direction) -> str | None:
    """Why a layer whose weight is split cannot be adapted, or None."""
    from torch.distributed.tensor import Shard

    W = kind.home(module)._parameters[kind.leaf(module)]
    if not kind.splits or type(module).forward is not kind.plain_forward():
        return f"its class {type(module).__name__} is adapted whole only"
    if not direction.plain:
        return f"the factors of {direction.name} are not split with it"
    if W.device_mesh.ndim != 1 or type(W.placements[0]) is not Shard:  # packed weights have a class of their own
        return f"it lies as {W.placements}, not by rows or columns over one dimension of processes"
    if W.shape[W.placements[0].dim] < W.device_mesh.size():
        return f"{tuple(W.shape)} leaves processes without a part"
    return None
