"""How ΔV is made, one file a direction, by declaration.

A direction declares its tensors (`Tensors`), its method names and its settings, and offers the two factors A (K, I) and B (O, K) of
ΔV = s·B·A. Everything else in the package asks the declaration: what is trained, what LoRA+ speeds up, what a file holds, which
methods there are. Files in this folder are found by themselves; a direction of your own is made known with `register`
(`tests/directions/test_own_direction.py` is one, docs/layers.md explains it).

    lora.py       A and B; none (magnitude only); an offset start, [A − A₀; A₀] and [B, B − B₀]
    vera.py       VeRA: frozen shared factors, two trained vectors
    products.py   LoHa and LoKr
    starts.py     PiSSA, OLoRA, LoftQ: values of other starts than B = 0
    checks.py     what is wrong with a declaration
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class Declared:
    """One tensor of a direction."""

    name: str
    shape: Callable[[int, int, int], tuple[int, ...]] | None = None
    """(O, I, R) -> its shape; None where the direction overrides `shapes`."""
    trained: bool = True
    output_factor: bool = False
    """Starts at 0 on the output's side: takes LoRA+'s rate."""
    in_file: str | None = None
    """Its name in an adapter file; None: its own."""


class Direction:
    """Subclasses declare; what they override is documented here, and `first` and `factors` they must. Instances have no state of a
    model, but for `for_model`'s."""

    name: str
    methods: Mapping[str, bool] = {}
    """Method name → with a magnitude?"""
    tensors: tuple[Declared, ...] = ()
    settings: Mapping[str, Any] = {}
    """Names and defaults of what `AdapterConfig.direction_settings` may hold; `for_model` reads them: `config.setting(name)`."""
    scaled = True
    """Is ΔV multiplied by s = alpha / rank? Else s = 1."""
    overrides = True
    """May modules have ranks of their own?"""
    starts: tuple[str, ...] = ("zero",)
    """Which values of `AdapterConfig.start` it has."""
    shared_names: tuple[str, ...] = ()
    """Names of tensors that all layers of an attachment share, of which a file holds one copy."""
    peft_type: str | None = None
    """PEFT's name for folders of this direction; None: PEFT has none."""
    peft_kinds: tuple[str, ...] = ()
    """Layer kinds that PEFT's folders of this type know."""
    plain = False
    """Are its tensors A and B themselves?"""
    file_rank = 1
    """Rank in an adapter file over the configured rank."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(declared.name for declared in self.tensors)

    @property
    def frozen(self) -> tuple[str, ...]:
        return tuple(declared.name for declared in self.tensors if not declared.trained)

    @property
    def output_factors(self) -> tuple[str, ...]:
        return tuple(declared.name for declared in self.tensors if declared.output_factor)

    def for_model(self, config, shapes: list[tuple[int, int]]) -> Direction:
        """The direction of one attachment: itself, or another instance with settings, with what layers share, for another start.

        shapes: (O, I) of all its layers; empty where only names and shapes of tensors are asked for."""
        return self

    def shapes(self, shape: tuple[int, int], rank: int) -> dict[str, tuple[int, ...]]:
        """Tensor name → shape, for a layer of shape (O, I)."""
        return {declared.name: tuple(declared.shape(*shape, rank)) for declared in self.tensors}

    def width(self, shape: tuple[int, int], rank: int) -> int:
        """K, the rank of the pair of factors."""
        return rank

    @abstractmethod
    def first(self, name: str, size: tuple[int, ...], shape: tuple[int, int], dtype, generator) -> Tensor:
        """The first value of one tensor on the CPU; together they give ΔV = 0. Drawn from the generator in the declared order."""
        raise NotImplementedError

    def create(self, module: nn.Module, shape: tuple[int, int], rank: int, seed: int, dtype, device) -> None:
        """Register the tensors on the module with their first values."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        for name, size in self.shapes(shape, rank).items():
            register_tensor(module, name, self.first(name, size, shape, dtype, generator), device)

    @abstractmethod
    def factors(self, tensors: tuple[Tensor, ...], shape: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
        """(A (K, I), B (O, K)), differentiable in the trained ones of `tensors`, which come in the declared order."""
        raise NotImplementedError

    def needs(self, needed: tuple[bool, ...]) -> tuple[bool, bool]:
        """Of which of A and B the gradient is needed, where those of `tensors` are."""
        return any(needed), any(needed)

    def pull_back(self, tensors, shape, dA, dB, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """The gradients of `tensors` from those of A and B, by autograd through `factors`."""
        import torch

        leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, needed, strict=True)]
        with torch.inference_mode(False), torch.enable_grad():
            factors = zip(self.factors(leaves, shape), (dA, dB), strict=True)
            pairs = [(y, dy.to(y.dtype)) for y, dy in factors if dy is not None and y.requires_grad]
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            outputs, gradients_out = zip(*pairs, strict=True)
            got = torch.autograd.grad(outputs, wanted, gradients_out, allow_unused=True)
        gradients = iter(got)
        return tuple(next(gradients) if need else None for need in needed)

    def refusal(self, shape: tuple[int, int], rank: int) -> str | None:
        """Why a layer of this shape cannot have this direction, or None."""
        return too_large(shape, rank)

    def constant_A(self) -> bool:
        """Does A never change, so that W·Aᵀ may be kept?"""
        return False

    def shared_A(self, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """A (R, I) of a layer of shape (O, I) as a part of one that layers share in this dtype; None: each has its own."""
        return None

    def file_shapes(self, shape: tuple[int, int], rank: int) -> dict[str, tuple[int, ...]]:
        """Name → shape of what a file holds for a layer of shape (O, I)."""
        return self.shapes(shape, rank)

    def to_file(self, tensors: dict[str, Tensor], shape, device) -> dict[str, Tensor]:
        """What a file holds, from the tensors by name. `shape` may have experts in front."""
        return tensors

    def of_file(self, tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
        """The tensors again, from what a file holds."""
        return tensors

    def shared_tensors(self) -> dict[str, Tensor]:
        """What all layers of the attachment share and a file holds once."""
        return {}

    def take_shared(self, tensors: dict[str, Tensor]) -> None:
        """Take shared tensors from a file: those of `shared_names` that it has."""

    def shared_problem(self, tensors: dict[str, Tensor], shapes: list[tuple[int, int]], rank: int) -> str | None:
        """Why shared tensors of a file do not fit layers of these shapes, or None."""
        return None


def register_tensor(module: nn.Module, name: str, value: Tensor | None, device) -> None:
    from torch import nn

    module.register_parameter(name, None if value is None else nn.Parameter(value.to(device)))


def too_large(shape: tuple[int, int], rank: int) -> str | None:
    """Why a rank does not fit a matrix, or None."""
    return f"rank {rank} is larger than its smaller side, {min(shape)}" if 0 < min(shape) < rank else None


def register(direction: Direction) -> Direction:
    """Make a direction known under its method names; one of the same name, if it was registered too, is replaced.

    Raises:
        UserError: a declaration that is impossible; the direction and the tensor or method are named.
    """
    if not isinstance(direction, Direction) or not isinstance(getattr(direction, "name", None), str):
        raise UserError(f"{direction!r} is no direction: expected an instance of a doratune.directions.Direction with a name")
    where = f"direction {direction.name!r}"
    from .checks import not_defined, tensor_problem

    if problem := not_defined(direction) or tensor_problem(direction) or _method_problem(direction):
        raise UserError(f"{where}: {problem}")
    unregister(direction.name)
    _directions().update(dict.fromkeys(direction.methods, direction))
    return direction


def unregister(name: str) -> None:
    """Forget a direction that was registered; those of this folder stay."""
    for method in [method for method, other in _directions().items() if other.name == name and not _is_built_in(other)]:
        del _known[method]


def _method_problem(direction: Direction) -> str | None:
    if not direction.methods:
        return "it has no method; declare methods = {'its_name': False, 'with_a_magnitude': True}"
    for method in direction.methods:
        other = _directions().get(method)
        if other is not None and (other.name != direction.name or _is_built_in(other)):
            return f"method {method!r} belongs to direction {other.name!r}; choose another name"
    from .lora import NONE, OFFSET

    if direction.name in {other.name for other in (*_directions().values(), NONE, OFFSET) if _is_built_in(other)}:
        return "there is a direction of that name; choose another"
    return None


def _is_built_in(direction: Direction) -> bool:
    return type(direction).__module__.startswith(__name__ + ".")


_known: dict[str, Direction] = {}
"""Method name → direction: which kinds there are, not what a model uses."""


def _directions() -> dict[str, Direction]:
    """Every method's direction, with the files of this folder imported."""
    if "lora" not in _known:
        for info in pkgutil.iter_modules(__path__):
            module = importlib.import_module(f".{info.name}", __name__)
            for direction in getattr(module, "DIRECTIONS", ()):
                _known.update(dict.fromkeys(direction.methods, direction))
    return _known


class _Methods(Mapping):
    """Method → (direction's name, with a magnitude?), as it is now."""

    def __getitem__(self, method: str) -> tuple[str, bool]:
        direction = _directions()[method]
        return direction.name, direction.methods[method]

    def __iter__(self) -> Iterator[str]:
        return iter(_directions())

    def __len__(self) -> int:
        return len(_directions())


METHODS = _Methods()


def direction_of(method: str) -> Direction:
    """The direction of a method, as it is declared."""
    return _directions()[method]


def direction_for(config, rank: int, shapes: list[tuple[int, int]] = ()) -> Direction:
    """The direction that a configuration gives layers of this rank; rank 0 trains the magnitude alone."""
    if not rank:
        from .lora import NONE

        return NONE
    return direction_of(config.method).for_model(config, list(shapes))


def file_names(direction: Direction) -> dict[str, str]:
    """Tensor → its name in an adapter file, of this direction's layers and of those that train their magnitude alone."""
    from .lora import LORA

    return {declared.name: declared.in_file or declared.name for one in (LORA, direction) for declared in one.tensors}


def all_shared() -> set[str]:
    """What layers of any direction share, as a file has it."""
    return {name for direction in _directions().values() for name in direction.shared_names}
