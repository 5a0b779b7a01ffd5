"""Modules that are trained whole (`also_train`): their parameters are fp32, as A, B and m are, and they compute as before.

    p  (the base's, bf16)  →  p′ = p in fp32, trained        forward = the class's own, with p′.to(bf16) in p's place while it runs

In bf16 a step of 1e-5 is below the spacing of nearly every entry, and in fp16 AdamW's ε is 0. The cast is part of the graph, and
the first one gives p again: the output is the base's bit for bit, in its dtype, under autocast too. Every module in the tree casts
for itself if nobody outside has done so: a checkpoint's second forward starts anywhere. Over an fp32 base nothing is cast.

What reads such a weight from outside a forward sees fp32. Two classes of PyTorch do so for their children and cast for them
(`READERS`). Cost: 4 bytes a parameter, and one copy of them in the base's dtype for each forward, kept until the backward.
"""

from __future__ import annotations

from functools import cache, wraps

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..bases import accumulation_dtype
from ..errors import UserError
from ..layers.adapted import Adapted, become
from ..layers.kind import calls_its_class
from ..layers.wrappers import module_at, named_modules, named_parameters

READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Classes whose forward reads the weights of the modules in it."""


class Whole:
    """Mixin in front of a module's own class."""

    plain_class: type
    """The class that the module had before; set on each subclass."""
    computes_in: dict[str, torch.dtype]
    """The module's own floating-point parameters, with the dtype that its forward sees them in."""

    def _apply(self, fn, recurse=True):
        """A move or a dtype change: the parameters stay fp32 (fp64 over an fp64 base), what is computed in follows."""
        before = {name: (p.data, None if p.grad is None else p.grad.data) for name, p in _wide_ones(self)}
        result = super()._apply(fn, recurse)
        dtypes = {}
        for name, dtype in self.computes_in.items():
            p = self._parameters.get(name)
            if name not in before or p is None:
                dtypes[name] = dtype if p is None else p.dtype
                continue
            data, grad = before[name]
            dtypes[name] = fn(torch.zeros(1, dtype=dtype, device=data.device)).dtype  # fp32 itself does not show a `.float()`
            wide = accumulation_dtype(dtypes[name])
            if p.dtype != wide:
                p.data = data.to(p.device, wide)
                if grad is not None:
                    p.grad = grad.to(p.device, wide)
        self.computes_in = dtypes
        return result

    def _load_from_state_dict(self, *args, **kwargs):
        """Values that a load assigned in a low precision become fp32."""
        wide = [name for name, _ in _wide_ones(self)]
        super()._load_from_state_dict(*args, **kwargs)
        for name in wide:
            p = self._parameters[name]
            if p.is_floating_point() and p.dtype.itemsize < 4:
                setattr(self, name, nn.Parameter(p.detach().float(), requires_grad=p.requires_grad))

    def __reduce_ex__(self, protocol):
        state = self.__getstate__() if hasattr(self, "__getstate__") else None
        return _rebuild, (type(self).plain_class,), self.__dict__.copy() if state is None else state

    def extra_repr(self) -> str:
        dtypes = {str(dtype).removeprefix("torch.") for dtype in self.computes_in.values()}
        return ", ".join(filter(None, [super().extra_repr(), f"trained whole, computes in {', '.join(dtypes)}" if dtypes else ""]))


@cache
def whole_class(cls: type) -> type:
    """`cls` under its own name (wrapping policies and `_no_split_modules` go by it), with a forward that casts."""

    @wraps(cls.forward)
    def forward(self, *args, **kwargs):
        cast = _cast(self)
        try:
            return cls.forward(self, *(_as_the_weight(self, args) if cast else args), **kwargs)
        finally:
            _put_back(cast)

    facts = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (Whole, cls), facts | {"plain_class": cls, "forward": forward})


def _rebuild(cls: type) -> nn.Module:
    whole = whole_class(cls)
    return whole.__new__(whole)


def _cast(module: nn.Module) -> list[tuple[nn.Module, dict, str, Tensor]]:
    """Put casts in the place of every parameter in the tree that is not what its forward sees; what was there, to be put back."""
    cast, done = [], {}
    for inner in module.modules():
        if not isinstance(inner, Whole):
            continue
        for name, dtype in inner.computes_in.items():
            held = inner._parameters if name in inner._parameters else inner.__dict__  # replicas hold plain attributes
            p = held.get(name)
            if p is None or p.dtype == dtype:
                continue
            if id(p) not in done:  # a tie stays a tie
                done[id(p)] = p.to(dtype)
            cast.append((inner, held, name, p))
            held[name] = done[id(p)]
            _seen(inner)
    return cast


def _put_back(cast: list[tuple[nn.Module, dict, str, Tensor]]) -> None:
    for inner, held, name, p in cast:
        held[name] = p
        _seen(inner)


def _seen(module: nn.Module) -> None:
    """Recurrent layers keep a list of their weights."""
    if isinstance(module, nn.RNNBase):
        module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]


def _as_the_weight(module: nn.Module, args: tuple) -> tuple:
    """An input in fp32 where the caller cast it to `weight.dtype`: without autocast these layers take only the weight's."""
    if not isinstance(module, nn.Linear | nn.modules.conv._ConvNd) or not args or not isinstance(args[0], Tensor):
        return args
    x, dtype = args[0], module.weight.dtype
    if not x.is_floating_point() or x.dtype == dtype or torch.is_autocast_enabled(x.device.type):
        return args
    return (x.to(dtype), *args[1:])


def _wide_ones(module: Whole) -> list[tuple[str, nn.Parameter]]:
    """Its own parameters that are in the precision of training."""
    found = [(name, module._parameters.get(name), dtype) for name, dtype in module.computes_in.items()]
    return [(name, p) for name, p, dtype in found if p is not None and p.dtype == accumulation_dtype(dtype)]


def train_whole(modules, names, trainable: bool) -> dict[str, nn.Parameter]:
    """Give modules that are trained whole fp32 parameters of their own; the originals (perhaps tied elsewhere) are returned."""
    replaced, own = {}, {}
    for name in names:
        for path, p in list(named_parameters(modules[name], remove_duplicate=False)):
            owner, _, leaf = path.rpartition(".")
            module = module_at(modules[name], owner)
            if id(p) not in own:  # a tie inside the module stays a tie
                wide = accumulation_dtype(p.dtype) if p.is_floating_point() and _casts(module) else p.dtype
                own[id(p)] = nn.Parameter(p.detach().to(wide, copy=True), requires_grad=trainable and p.is_floating_point())
            replaced[f"{name}.{path}"] = p
    for name in names:
        for module in list(modules[name].modules()):
            if next(module.parameters(), None) is not None:
                _put_on(module)
            for leaf, p in module._parameters.items():
                if p is not None and id(p) in own:
                    module._parameters[leaf] = own[id(p)]
            _seen(module)
    return replaced


def keep_whole_wide(module: Whole) -> None:
    """Its own parameters in the precision of training, in place."""
    for name, dtype in module.computes_in.items():
        p = module._parameters.get(name)
        if p is not None and p.dtype.itemsize < accumulation_dtype(dtype).itemsize and p.requires_grad:
            p.data = p.data.to(accumulation_dtype(dtype))


def put_values(model: nn.Module, parameters: dict[str, nn.Parameter], trainable: dict[str, bool]) -> None:
    """Give modules that `train_whole` has just prepared parameters that were trained before, where the model is now."""
    for path, p in parameters.items():
        now = model.get_parameter(path)
        p.data = p.data.to(now.device, now.dtype)
        p.requires_grad_(trainable[path])
    _set(model, parameters)


def _put_on(module: nn.Module) -> None:
    if not isinstance(module, Whole):
        own = module._parameters.items()
        module.computes_in = {leaf: p.dtype for leaf, p in own if p is not None and p.is_floating_point()}
        become(module, whole_class(type(module)))


def _casts(module: nn.Module) -> bool:
    """Does its class's forward run, and read the parameters first? Where not, they stay as they are, and `verify` says so."""
    first = not any(isinstance(hook, WeightNorm | SpectralNorm) for hook in module._forward_pre_hooks.values())
    return first and ("forward" not in vars(module) or calls_its_class(module))


def cover_readers(model: nn.Module) -> None:
    """Once all is attached: whoever reads the weights of a module that is trained whole casts them as it would."""
    for module in model.modules():
        if isinstance(module, READERS) and not isinstance(module, Adapted | Whole):
            if any(isinstance(inner, Whole) for inner in module.modules()):
                module.computes_in = {}
                become(module, whole_class(type(module)))


def give_back(model: nn.Module, replaced: dict[str, nn.Parameter]) -> None:
    """Undo `train_whole` and `cover_readers`: the very originals, where the model is now, in the dtype it computes in."""
    for path, p in replaced.items():
        owner, _, leaf = path.rpartition(".")
        module = module_at(model, owner)
        now = module._parameters[leaf]
        dtype = vars(module).get("computes_in", {}).get(leaf, now.dtype)
        p.data = p.data.to(now.device, dtype)
        module._parameters[leaf] = p
        _seen(module)
    leave(model)


def leave(model: nn.Module) -> None:
    """Give modules that were trained whole their plain classes, with the parameters that they have now."""
    for module in model.modules():
        if isinstance(module, Whole):
            del module.computes_in
            become(module, type(module).plain_class)


def _all_own(model: nn.Module) -> list[tuple[str, nn.Module, str, torch.dtype]]:
    """(path, module, leaf, dtype it computes in) of every floating-point parameter that is trained whole."""
    found = []
    for path, module in named_modules(model, remove_duplicate=False):
        leaves = module.computes_in.items() if isinstance(module, Whole) else ()
        found += [(f"{path}.{leaf}" if path else leaf, module, leaf, dtype) for leaf, dtype in leaves]
    return [each for each in found if each[1]._parameters.get(each[2]) is not None]


def compute_dtypes(model: nn.Module) -> dict[int, torch.dtype]:
    """id of a parameter that is trained whole → the dtype that the model computes in with it."""
    return {id(module._parameters[leaf]): dtype for _, module, leaf, dtype in _all_own(model)}


def check(model: nn.Module) -> None:
    """Can these parameters be rounded to the base's dtype?

    Raises:
        UserError: NaN or infinite values, or values beyond it (fp16).
    """
    for path, module, leaf, dtype in _all_own(model):
        p = module._parameters[leaf]
        if not torch.isfinite(p).all():
            raise UserError(f"{path} holds NaN or infinite values; merging is refused, nothing was changed")
        if dtype == torch.float16 and not torch.isfinite(p.to(dtype)).all():
            raise UserError(f"{path} overflows float16; merging is refused, nothing was changed: use bfloat16")


def narrow(model: nn.Module) -> dict[str, nn.Parameter]:
    """Put parameters in the base's dtype in place, for `merge`: nothing is cast in a forward any more. Returns what they were."""
    wide, narrowed = {}, {}
    for path, module, leaf, dtype in _all_own(model):
        p = module._parameters[leaf]
        if p.dtype != dtype:
            wide[path] = p
            if id(p) not in narrowed:
                narrowed[id(p)] = nn.Parameter(p.detach().to(dtype), requires_grad=p.requires_grad)
    _set(model, {path: narrowed[id(p)] for path, p in wide.items()})
    return wide


def widen(model: nn.Module, wide: dict[str, nn.Parameter]) -> None:
    """Undo `narrow`; a move meanwhile is kept."""
    for path, p in wide.items():
        owner, _, leaf = path.rpartition(".")
        now = module_at(model, owner)._parameters[leaf]
        p.data = p.data.to(now.device, accumulation_dtype(now.dtype))
    _set(model, wide)


def _set(model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    for path, p in parameters.items():
        owner, _, leaf = path.rpartition(".")
        module = module_at(model, owner)
        module._parameters[leaf] = p
        _seen(module)
