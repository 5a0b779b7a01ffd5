"""FSDP2's own objects, touched here and nowhere else: what it keeps of each parameter in shards, by weight and name.

A group of parameters is brought whole together, with one collective. Those of an adapter join the group of the layer's weight, also
where it was sharded before the adapter was attached, and leave it when the adapter is taken off. Nothing is sent for either.

A forward leaves copies in the modules: the root's always, all with `reshard_after_forward=False`. They are not the parameters: what
is written into them, their `requires_grad` and an optimizer's steps on them are lost. So whatever looks at a model between calls
begins with `reshard`.
"""

from __future__ import annotations

import sys

from torch import Tensor, nn

TWICE = "split by a tensor-parallel plan and in shards of fully_shard, too, which an adapter does not follow; use one of them"


class Share:
    """One tensor that FSDP2 keeps in shards: `param` is its record of it, one of those of `group`."""

    __slots__ = ("group", "param")

    def __init__(self, group, param):
        self.group, self.param = group, param

    @property
    def local(self) -> Tensor:
        """This process's own numbers."""
        return self.param.sharded_param._local_tensor

    @property
    def twice(self) -> bool:
        """Is it a share of a share: was it split by another engine before?"""
        return self.param.is_dtensor

    @property
    def cast(self) -> bool:
        """Do calls see it rounded to a policy's dtype?"""
        return self.param.param_dtype is not None


def fsdp_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that `fully_shard` was called for."""
    cls = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return [] if cls is None else [module for module in model.modules() if isinstance(module, cls)]


def shares_of(model: nn.Module) -> dict[tuple[int, str], Share]:
    """(id of the module that holds it, its name there) → share, of every parameter under FSDP2."""
    found = {}
    for module in fsdp_modules(model):
        for group in _groups(module):
            for param in group.fsdp_params:
                info = param._module_info
                if param.sharded_param.is_meta:  # loaded since: FSDP2 itself would look at its first forward
                    param.reset_sharded_param()
                places = [(info.module, info.param_name), *zip(info.shared_modules, info.shared_param_names, strict=True)]
                found |= {(id(holder), name): Share(group, param) for holder, name in places}
    return found


def _groups(module: nn.Module) -> list:
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    return [group for group in (state._fsdp_param_group,) if group is not None] if groups is None else list(groups)


def reshard(model: nn.Module) -> None:
    """Put the parameters in the place of their whole copies, but in modules that are computing now; nothing is sent. A backward
    brings the copies that it needs again."""
    for module in fsdp_modules(model):
        for group in _groups(module):
            if group._training_state.name == "IDLE":
                group.wait_for_unshard()  # one that was begun ahead of a call
                group.reshard()


def keep_wide(shares: list[Share]) -> None:
    """Let FSDP2 bring these as they are, whatever its policy casts; a group that was brought already is brought again."""
    late = {}
    for share in shares:
        if share.cast:
            share.param.param_dtype = None
            if hasattr(share.param, "_unsharded_param"):
                late.setdefault(id(share.group), (share.group, []))[1].append(share.param)
    for group, params in late.values():
        group.wait_for_unshard()
        again = group.is_unsharded
        group._to_sharded()
        for param in params:
            del param._unsharded_param
            param.all_gather_outputs = []
        if again:
            group.unshard()
            group.wait_for_unshard()


def leave(weight) -> None:
    """A layer's parameters are taken off: their group does not bring them any more."""
    for name, share in weight.shares.items():
        if name in weight.names and isinstance(share, Share) and share.param in share.group.fsdp_params:
            share.group.fsdp_params.remove(share.param)
            share.param._post_load_hook_handle.remove()


def rejoin(weight) -> None:
    """Undo `leave`."""
    for name, share in weight.shares.items():
        if name in weight.names and isinstance(share, Share) and share.param not in share.group.fsdp_params:
            share.group.fsdp_params.append(share.param)


def join(module: nn.Module, names: list[str], like: Share) -> None:
    """Shard new whole parameters of a module as FSDP2 would have, and let the group of its weight bring them; nothing is sent."""
    group, record = like.group, type(like.param)
    if group.is_unsharded:
        group._to_sharded()
    for name in names:
        info = type(like.param._module_info)(module, name)
        policies = group.mp_policy, group.offload_policy
        param = record(module._parameters[name], info, group.mesh_info, group.post_forward_mesh_info, group.device, None, *policies)
        param.init_dtype_attrs(group.mp_policy)
        group.fsdp_params.append(param)
    if hasattr(group, "_orig_dtype"):  # it has run already
        group._init_mp_dtypes()
