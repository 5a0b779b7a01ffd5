"""Which layers and adapters of PEFT are known here, why others are left to PEFT, and where their tensors are.

    Linear, bitsandbytes, HQQ …    lora_A[name].weight (R, I), lora_B[name].weight (O, R), lora_magnitude_vector[name].weight (O,)
    Conv1d, Conv2d, Conv3d         the same with a kernel: (R, I, k…), (O, R, 1…), (1, O, 1…)
    Embedding                      lora_embedding_A[name] (R, tokens), lora_embedding_B[name] (I, R), m (I,): Bᵀ and Aᵀ of the maths

Nothing is imported: a model with layers of PEFT has imported PEFT.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from ..errors import with_article
from ..layers import kind_of
from ..layers.kind import LayerKind
from ..layers.shares import managed_module


class Place(NamedTuple):
    """Where a tensor is: the module that owns the parameter, its name there; how it is seen as a matrix or vector, and back."""

    owner: nn.Module
    name: str
    seen: Callable[[Tensor], Tensor] | None = None
    back: Callable[[Tensor, Tensor], Tensor] | None = None


def is_lora(module: nn.Module) -> bool:
    """Is this a layer of PEFT's LoRA?"""
    layers = getattr(sys.modules.get("peft.tuners.lora.layer"), "LoraLayer", None)
    return layers is not None and isinstance(module, layers)


def is_adapted(module: nn.Module) -> bool:
    """Is this a layer of any method of PEFT?"""
    layers = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", None)
    return layers is not None and isinstance(module, layers)


def dora_adapters(module: nn.Module) -> list[str]:
    """Names of the adapters of this layer that have a magnitude and PEFT's plain way with it."""
    variants = sys.modules.get("peft.tuners.lora.variants")
    classes = (getattr(variants, name, None) for name in ("DoraLinearVariant", "DoraEmbeddingVariant", "_DoraConvNdVariant"))
    forwards = {cls.forward for cls in classes if cls is not None}
    own = vars(module).get("lora_variant", {})
    return [name for name, variant in own.items() if type(variant).forward in forwards and name in module.lora_magnitude_vector]


def refusal(module: nn.Module) -> str | None:
    """Why a layer of PEFT with a DoRA adapter is left to PEFT altogether, or None."""
    base = module.base_layer
    if not getattr(type(module).forward, "__module__", "").startswith("peft.tuners.lora."):
        return f"the forward of its class {type(module).__name__} is not PEFT's"
    if is_adapted(base):
        return "it stands around another adapter"
    if getattr(module, "tp_layer", None) is not None:
        return "its weight is split over several devices"
    if managed_module(base):
        return "its weight is in shards, or offloaded"
    if (kind := kind_of(base)) is None:
        return f"its base layer is {with_article(type(base).__name__)}, of no kind that is known here"
    if problem := kind.refusal(base):
        return problem
    if kind.base(base).device(base).type == "meta":
        return "its weight is on the meta device"
    if getattr(module, "fan_in_fan_out", kind.transposed) != kind.transposed and not _is_embedding(module):
        return f"fan_in_fan_out is {module.fan_in_fan_out} on {with_article(type(base).__name__)}"
    if kind.name == "Conv":
        return _conv_refusal(base)
    return None


def _conv_refusal(base: nn.Module) -> str | None:
    """Of convolutions, whose low-rank part PEFT runs with a stride and a padding alone."""
    if base.groups > 1:
        return f"PEFT's low-rank part has no groups, its base layer has {base.groups}"
    if any(step != 1 for step in base.dilation):
        return f"PEFT's low-rank part has no dilation, its base layer has {tuple(base.dilation)}"
    if base.padding_mode != "zeros":
        return f"PEFT's low-rank part pads with zeros, its base layer in mode {base.padding_mode}"
    return None


def places(module: nn.Module, adapter: str, kind: LayerKind) -> dict[str, Place] | None:
    """Where A, B and m of one adapter are; None where they are not plain parameters of their own (wrapped, or sharded)."""
    magnitude = module.lora_magnitude_vector[adapter]
    if _is_embedding(module):
        A = Place(module.lora_embedding_B, adapter, transposed, untransposed)
        B = Place(module.lora_embedding_A, adapter, transposed, untransposed)
    else:
        seen = (_matrix, _reshaped) if kind.name == "Conv" else ()
        A, B = (Place(parts[adapter], "weight", *seen) for parts in (module.lora_A, module.lora_B))
    m = Place(magnitude, "weight", *((_vector, _reshaped) if kind.name == "Conv" else ()))
    if any(not isinstance(place.owner._parameters.get(place.name), Tensor) for place in (A, B, m)):
        return None
    if any(getattr(place.owner, "bias", None) is not None for place in (A, B)):
        return None
    return {"lora_A": A, "lora_B": B, "magnitude": m}


def holders(module: nn.Module, adapter: str, places: dict[str, Place]) -> list[tuple[dict, str, nn.Module]]:
    """(where it is, its key there, the module) of each module that holds A, B or m of an adapter."""
    own, owners = module._modules, [place.owner for place in places.values()]
    m = own["lora_magnitude_vector"]._modules, adapter, owners[2]
    if _is_embedding(module):
        return [(own, "lora_embedding_B", owners[0]), (own, "lora_embedding_A", owners[1]), m]
    return [(own["lora_A"]._modules, adapter, owners[0]), (own["lora_B"]._modules, adapter, owners[1]), m]


def _is_embedding(module: nn.Module) -> bool:
    return hasattr(module, "_embed")


def hooks(module: nn.Module) -> tuple[dict, ...]:
    """The dicts of its hooks: where all are empty, a call of the module is a call of its forward."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def _matrix(t: Tensor) -> Tensor:
    return t.flatten(1)


def _vector(t: Tensor) -> Tensor:
    return t.flatten()


def transposed(t: Tensor) -> Tensor:
    return t.T


def untransposed(t: Tensor, stored: Tensor) -> Tensor:
    return t.T


def _reshaped(t: Tensor, stored: Tensor) -> Tensor:
    return t.reshape(stored.shape)
