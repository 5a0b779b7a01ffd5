"""transformers' batched expert weights (E, O, I): one DoRA layer for each expert, of which only the routed ones cost anything.

    y = x·W_eᵀ + (g_e − 1) ⊙ x·W_eᵀ + (x·A_eᵀ)·(s·g_e ⊙ B_e)ᵀ       for the tokens x of expert e; g_e = m_e/|W_e + s·B_e·A_e|

W (E, O, I) is `gate_up_proj`, `up_proj` or `down_proj` of a module made with transformers' `use_experts_implementation`; stored
(E, I, O) where `is_transposed` (GPT-OSS). A (E, R, I), B (E, O, R), m (E, O) (§3.1 for each expert).

The forward is the class's own eager one, in which `self.gate_up_proj[e]` is an operand that answers a product with the adapted
product: gates, biases, routing weights and the order of sums stay the class's, bit for bit its `experts_implementation="eager"`.

While adapted, each weight has a child module `adapter_of_<weight>` that holds A, B and m; the weight stays where it was.
Cost over eager: a norm per optimizer step and routed expert, and LoRA's products. The routed loop runs outside torch.compile (a
graph break, as its shapes follow the data).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn

from .adapted import Adapted, become, keep_precision
from .conv1d import Conv1DKind
from .kind import LayerKind, outside_compile
from .linear import LinearKind
from .parts import BatchWeight, PartWeight
from .shares import is_share
from .weight import compute_dtype

CHILD = "adapter_of_"
_MATMULS = (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__)


class ExpertWeight(nn.Module):
    """One batched weight of an experts module, as a layer: what is selected and adapted. Called, it gives its matrices by index."""

    def __init__(self, owner: nn.Module, part: str):
        super().__init__()
        self.holder, self.part = (owner,), part  # in a tuple: the owner is no child
        self.training = owner.training

    @property
    def owner(self) -> nn.Module:
        return self.holder[0]

    @property
    def weight(self) -> nn.Parameter:
        return self.owner._parameters[self.part]

    def forward(self):
        return self.weight.unbind(0)

    def extra_repr(self) -> str:
        return " x ".join(map(str, self.weight.shape))


class ExpertsKind(LayerKind):
    """A batched weight stored (E, O, I)."""

    name = "Experts"
    linear = False
    stacked = True
    batch_first = False
    expert_kind = LinearKind()

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, ExpertWeight) and bool(module.owner.is_transposed) == self.transposed

    def weight(self, **choices) -> BatchWeight:
        return BatchWeight(**choices)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.mT if self.transposed else weight

    def forward(self, module) -> Bank:
        module.adapted.calls += 1
        return Bank(module)

    @torch.no_grad()
    def probe(self, module: nn.Module) -> str | None:
        """Does the class's own forward use this weight in just one product for each expert? Tried on one token."""
        owner, used = module.owner, []
        up = owner.gate_up_proj if owner.has_gate else owner.up_proj
        if isinstance(owner, AdaptedExperts) or up.is_meta:
            return None
        if is_share(up):
            return f"the weights of {type(owner).__name__} are in shards, where its forward is not tried; attach, then fully_shard"

        def seen(x, bias):
            used.append(x)
            return base_product(x, module.weight[0], bias, self.transposed)

        x = torch.linspace(-1, 1, self.matrix(up).shape[2]).view(1, -1).to(up)
        stand, index = Stand(owner, {module.part: [Operand(seen, self.transposed)]}), x.new_zeros(1, 1, dtype=torch.long)
        try:
            eager_forward(type(owner))(stand, x, index, x.new_ones(1, 1))
        except Exception as error:  # any forward of any class
            return f"the forward of {type(owner).__name__} is not a loop of products over its experts ({type(error).__name__})"
        return None if len(used) == 1 else f"the forward of {type(owner).__name__} does not use it once for each expert"

    def key(self, name: str) -> str:
        return name

    def home(self, module: nn.Module) -> nn.Module:
        return module.owner

    def leaf(self, module: nn.Module) -> str:
        return module.part

    def joined(self, module: nn.Module) -> None:
        """Register the adapted layer with its owner, whose forward then uses it."""
        setattr(module.owner, CHILD + module.part, module)
        if not isinstance(module.owner, AdaptedExperts):
            become(module.owner, _adapted_experts(type(module.owner)))

    def left(self, module: nn.Module) -> None:
        delattr(module.owner, CHILD + module.part)
        if not children(module.owner):
            become(module.owner, type(module.owner).plain_class)


class TransposedExpertsKind(ExpertsKind):
    """A batched weight stored (E, I, O)."""

    name = "TransposedExperts"
    transposed = True
    expert_kind = Conv1DKind()


class Bank:
    """The experts of one adapted weight in one call: `bank[e]` multiplies as W_e does, adapted.

    The parameters are split once for all experts: each slice by itself would cost autograd a gradient of all E."""

    def __init__(self, layer: nn.Module):
        self.weight = layer.adapted
        self.live = list(zip(*(p.unbind(0) for p in self.weight.tensors()), strict=True)) if torch.is_grad_enabled() else None

    def __getitem__(self, index) -> Operand:
        part = self.weight.part(int(index))
        live = None if self.live is None else self.live[int(index)] if self.live else ()
        return Operand(partial(product, part, live), self.weight.kind.transposed)


def product(weight: PartWeight, live, x: Tensor, bias: Tensor | None) -> Tensor:
    """x·W'ᵀ + bias of one expert; live: its parameters as autograd follows them."""
    W, transposed = weight.layer.weight, weight.kind.transposed
    weight.calls += 1
    if weight.magnitude and weight.axis == "input":
        x = weight.scaled_input(x, compute_dtype(x), live)
    plain = x.dtype == W.dtype and not W.requires_grad and not torch.is_autocast_enabled(x.device.type)
    if plain and weight.rank and not transposed:
        return weight.compose(x, W, bias, own=True, live=live)
    out = base_product(x, W, bias, transposed)
    if not weight.rank and weight.axis == "input":
        return out
    return weight.compose(x, out, bias, live=live)


def base_product(x: Tensor, W: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return x @ W if transposed else nn.functional.linear(x, W, bias)


class Operand:
    """Stands for W_e in a product: `linear(x, W_e)`, or `x @ W_e` where the weight is transposed; anything else is refused."""

    def __init__(self, multiply: Callable[[Tensor, Tensor | None], Tensor], transposed: bool):
        self.multiply, self.transposed = multiply, transposed

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        x, weight, *bias = args
        if isinstance(weight, cls) and torch.is_tensor(x) and x.dim() == 2:
            if func is nn.functional.linear and not weight.transposed:
                return weight.multiply(x, bias[0] if bias else (kwargs or {}).get("bias"))
            if func in _MATMULS and weight.transposed:
                return weight.multiply(x, None)
        raise TypeError(
            f"an adapted expert weight takes part in {getattr(func, '__name__', func)}; only its product with 2-D x is known"
        )


class Stand:
    """Stands for the experts module in the class's own forward, with other things in place of its weights."""

    def __init__(self, module: nn.Module, weights: dict):
        self.__dict__.update(weights)
        self._module = module

    def __getattr__(self, name: str):
        return getattr(self._module, name)


class AdaptedExperts:
    """Mixin in front of an experts class of which a weight is adapted."""

    plain_class: type

    @outside_compile
    def forward(self, *args, **kwargs):
        weights = {layer.part: layer() for layer in children(self)}
        return eager_forward(type(self).plain_class)(Stand(self, weights), *args, **kwargs)

    def _apply(self, fn, recurse=True):
        """The weight is the owner's, A, B and m are its children's: those are kept in fp32, and m follows the weight."""
        apply = partial(super()._apply, fn, recurse)
        for layer in children(self):
            apply = partial(keep_precision, layer, apply)
        return apply()

    def __reduce_ex__(self, protocol):
        state = self.__getstate__() if hasattr(self, "__getstate__") else None
        return _rebuild, (type(self).plain_class,), self.__dict__.copy() if state is None else state


@cache
def _adapted_experts(cls: type) -> type:
    return type(f"Adapted{cls.__name__}", (AdaptedExperts, cls), {"__module__": cls.__module__, "plain_class": cls})


def _rebuild(cls: type) -> nn.Module:
    adapted = _adapted_experts(cls)
    return adapted.__new__(adapted)


def eager_forward(cls: type):
    """The class's own loop over experts, below transformers' choice of an implementation."""
    return getattr(cls.forward, "__wrapped__", cls.forward)


def children(owner: nn.Module) -> list[nn.Module]:
    """The adapted weights of an experts module."""
    return [layer for layer in owner._modules.values() if isinstance(layer, ExpertWeight) and isinstance(layer, Adapted)]
