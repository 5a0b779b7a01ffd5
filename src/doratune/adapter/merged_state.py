"""The merged model's state dict beside the live model: for an engine or an RL loop that wants weights while training goes on.

    key of an adapted weight    W' = g ⊙ (W + s·B·A) (Eq. 5), a copy in the weight's dtype
    all others                  the model's own tensors, modules that are trained whole in the dtype that they compute in

Of a model in shards, shares of both: one whole weight is there at a time. Of an offloaded one, and under ZeRO-3, all is fetched.

Cost: one copy of each adapted weight, in row tiles of fp32; nothing of the model is touched.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..layers.experts import CHILD
from ..layers.shares import at_hand, is_share, put_value
from ..layers.wrappers import plain_state, unwrapped
from ..layers.zero3 import in_parts
from ..math.autograd import no_autocast
from . import whole
from .attach import adapters, record_of
from .merge import checked_norm, merged_dtype, merged_tiles, model_dtype


@torch.no_grad()
def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Key → tensor, with the keys and values that `merge` and then `state_dict` would give; the model stays as it is.

    Quantized layers have one dense weight, in the model's dtype.

    Raises:
        UserError: nothing is attached, the adapter is merged, or a weight would not be finite.
    """
    record, model = record_of(model), unwrapped(model)
    if record.merged is not None:
        raise UserError("this model is merged: its state_dict() is the merged one")
    record.registry.find_shares(model)
    layers, state = list(adapters(model)), plain_state(model)
    state |= _fetched(model, state)
    common = model_dtype(model, layers)
    dtypes = whole.compute_dtypes(model)
    merged = {key: t.detach().to(dtypes.get(id(t), t.dtype)) for key, t in state.items() if f".{CHILD}" not in f".{key}"}
    for name, module in layers:
        with no_autocast(module.adapted.device):
            weight = _merged_weight(name, module, merged_dtype(module, common, "dense", module.adapted.factors))
        kind = module.adapted.kind
        own = {f"{name}.{key}" for key in module.adapted.names}
        if not module.adapted.base.writable:
            own |= {key for key in merged if key.startswith(f"{name}.") and key != kind_key(kind, name, "bias")}
        merged = {key: t for key, t in merged.items() if key not in own} | {kind.key(name): weight}
    return merged


def kind_key(kind, name: str, leaf: str) -> str:
    """The key of a parameter beside the layer's weight."""
    return f"{kind.key(name).rpartition('.')[0]}.{leaf}"


def _merged_weight(name: str, module: nn.Module, dtype: torch.dtype) -> Tensor:
    """W' in the shape and layout of the layer's own weight; of a quantized layer (O, I)."""
    adapted, base = module.adapted, module.adapted.base
    share = adapted.stored()
    with at_hand(module):
        if base.writable:
            copy = base.weight(module).detach().clone()
            target = adapted.kind.matrix(copy)
        else:
            copy = target = torch.empty(adapted.shape, dtype=dtype, device=adapted.device)
        parts = adapted.matrices()
        for index, part in enumerate(parts):
            rows_of = target if len(parts) == 1 and parts[0] is adapted else target[index]
            for rows, tile in merged_tiles(part, checked_norm(name, part, dtype)):
                rows_of[rows] = tile.to(rows_of.dtype)
    if not is_share(share) or not base.writable:
        return copy
    result = share.detach().clone()
    put_value(result, copy)
    return result


def _fetched(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What accelerate keeps elsewhere, and ZeRO-3 in parts, copied."""
    found, keys = {}, {id(t): key for key, t in state.items() if t.is_meta or in_parts(t)}
    for module in model.modules() if keys else ():
        places = {name: keys[id(t)] for name, t in (*module._parameters.items(), *module._buffers.items()) if id(t) in keys}
        if places:
            with at_hand(module):
                held = {**module._parameters, **module._buffers}
                found |= {key: held[name].detach().clone() for name, key in places.items()}
    return found
