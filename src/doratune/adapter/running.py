"""What really runs in a model: which adapted layers are called, and which weights are read past their layer's forward.

A parent that hands `layer.weight` to a function (`F.linear(x, self.proj.weight)`, `F.multi_head_attention_forward`, a kernel) never
calls the layer, so an adapter there does nothing. Two signs tell, of any class:

    read       a torch function got the weight while no adapted forward was running; the function's name is known
    passed by  the module that holds the layer ran, the layer did not: also where a kernel takes the weight unseen by torch

What belongs to no forward at all (an encoder of another modality, an expert without tokens) is neither, but not reached. Lists of
modules run nothing themselves, so what is in them is never passed by.

Cost, while watching only: one look at the arguments of each torch call, one hook on each parent.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..layers.adapted import Adapted
from .attach import adapters

_METADATA = {
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like"),
    *("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "grad"),
}
"""Torch functions that take a tensor for its shape, dtype and device alone."""

_FIRST = {"to", "type_as", "view_as", "reshape_as", "expand_as"}
"""Those whose further tensors are taken for that."""

_OURS = tuple(f"{__package__.partition('.')[0]}.{room}." for room in ("layers", "math", "bases", "directions"))


class Running(TorchFunctionMode):
    """Watch an attached model while it runs: `with Running(model) as seen: model(x)`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.layers = dict(adapters(model))
        self.reads: dict[str, str] = {}
        """Name of an adapted layer → the function that read its weight outside of the layer's forward."""
        weights = {name: _weight(layer) for name, layer in self.layers.items()}  # an offloaded one is another tensor each time
        self._weights = {id(w): name for name, w in weights.items() if w is not None and not w.is_meta}
        self._calls = {name: layer.adapted.calls for name, layer in self.layers.items()}
        modules = dict(model.named_modules())
        self._parents = {name: modules.get(name.rpartition(".")[0]) for name in self.layers if name}
        self._ran: set[int] = set()
        self._hooks: list = []

    def __enter__(self):
        for parent in {id(m): m for m in self._parents.values() if m is not None and not isinstance(m, Adapted)}.values():
            self._hooks.append(parent.register_forward_pre_hook(self._note))
        return super().__enter__()

    def __exit__(self, *error):
        while self._hooks:
            self._hooks.pop().remove()
        return super().__exit__(*error)

    def _note(self, module, args) -> None:
        self._ran.add(id(module))

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = _name(function)
        given = (*args[:1],) if name in _FIRST else (*args, *(kwargs or {}).values())
        for weight in _tensors(given):
            layer = self._weights.get(id(weight))
            if layer and layer not in self.reads and name not in _METADATA and next(_tensors((result,)), None) is not None:
                if not _inside():
                    self.reads[layer] = name
        return result

    def called(self, name: str) -> bool:
        return self.layers[name].adapted.calls != self._calls[name]

    @property
    def never_ran(self) -> list[str]:
        """Layers whose forward was not called."""
        return [name for name in self.layers if not self.called(name)]

    @property
    def passed_by(self) -> list[str]:
        """Layers that were not called although the module that holds them ran."""
        return [name for name in self.never_ran if name in self._parents and id(self._parents[name]) in self._ran]

    def problems(self) -> dict[str, str]:
        """Layer → why an adapter there does nothing, or only a part of what it should."""
        found = {name: "is passed by: the module that holds it ran, its own forward did not" for name in self.passed_by}
        for name, function in self.reads.items():
            half = "" if not self.called(name) else " besides, where the adapter is not seen"
            found[name] = f"has its weight read by {function}{half}"
        return found


def _weight(layer) -> Tensor | None:
    """The weight as a parent can read it."""
    kind = layer.adapted.kind
    weight = getattr(kind.home(layer), kind.weight_name, None)
    return weight if isinstance(weight, Tensor) else None


def _name(function) -> str:
    """`linear` of F.linear, `T` of the property `Tensor.T`."""
    name = getattr(function, "__name__", "a function")
    return getattr(getattr(function, "__self__", None), "__name__", name) if name == "__get__" else name


def _tensors(values, depth: int = 0):
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple) and depth < 2:
            yield from _tensors(value, depth + 1)


def _inside() -> bool:
    """Is an adapted forward on the stack?"""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(_OURS):
            return True
        frame = frame.f_back
    return False


def watchable(model: nn.Module) -> bool:
    """Can calls be watched here? Compiled code is traced once and not looked at again."""
    compiled = any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in model.modules())
    return not compiled and not torch.compiler.is_compiling()
