"""Calls that go another way than the adapter in use, in a block and in one thread: the base, or an adapter for each example.

    disabled   the base, bit for bit                  mixed   an adapter, or none, for each example of a batch

A `Route` stands in the `forward` of each layer while some thread is in such a block; other threads find the layer's own behind it.

Cost: nothing outside of the blocks. Without gradients, `mixed` makes the base's product once for the whole batch and adds each
adapter's part to its examples; else it runs each layer once for each adapter of the batch, on that adapter's examples.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..errors import UserError, listed
from ..layers.kind import outside_compile
from ..layers.layouts import layer_at
from ..layers.registry import Registry
from ..layers.tensor_parallel import computed_in_parts
from ..layers.watch import few_tokens
from ..layers.wrappers import unwrapped
from .attach import adapters
from .several import check_known, layers_of, placing, record_named
from .states import RECORD, refuse_merged


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model, bit for bit, in the block and in this thread; other threads go on with the adapter. Blocks may be nested.

    Raises:
        UserError: the adapter is merged, or it trains whole modules.
    """
    with _routed(model, None):
        yield


@contextlib.contextmanager
def mixed(model: nn.Module, chosen: Sequence[str | None]) -> Iterator[Destination]:
    """In the block and in this thread, example i of a batch goes through the adapter `chosen[i]`; None: through the base.

    The first dimension of every adapted layer's input is the batch: linear layers, convolutions and embeddings. For a batch of
    other examples in the same block, `choose` of what this gives; entering a block prepares each adapter anew, choosing does not.

    Raises:
        UserError: no adapter of a name, an attention's or experts' layers, modules that are trained whole; in the block: a batch
            of another size.
    """
    for name in {name for name in chosen if name is not None}:
        check_known(model, name)
    if not chosen:
        raise UserError("chosen is empty; give the name of an adapter, or None, for each example of the batch")
    with _routed(model, list(chosen)) as way:
        yield way


@contextlib.contextmanager
def _routed(model: nn.Module, chosen: list[str | None] | None) -> Iterator[Destination]:
    """Send this thread's calls of adapted layers another way."""
    model = unwrapped(model)
    record = vars(model).get(RECORD)
    if record is not None and record.merged is not None:
        refuse_merged(record, "another way of its calls")
    used = sorted({name for name in chosen or () if name is not None}) or ([] if record is None else [record.name])
    for name in used:
        if record_named(model, name).also_train:
            raise UserError(f"adapter {name!r} trains whole modules too (also_train); use doratune.use(model, None) for the base")
    active = {} if record is None else dict(adapters(model))
    shadows = {} if chosen is None else {name: layers_of(model, name) for name in used}
    layers = set(active).union(*shadows.values())
    if split := sorted(name for name in layers if computed_in_parts(layer_at(model, name))):
        raise UserError(f"{listed(split)}: split by a tensor-parallel plan, in all calls alike; doratune.use switches the model")
    if chosen is not None:
        _check_mixable(model, layers)
    way = Destination(chosen, {} if chosen is None else {name: record_named(model, name).registry for name in used})
    routes = []
    try:
        for layer in layers:
            module = layer_at(model, layer)
            kind = module.adapted.kind if hasattr(module, "adapted") else None
            routes.append(Route.of(module if kind is None else kind.home(module)))
            routes[-1].enter(way, {name: each[layer] for name, each in shadows.items() if layer in each})
        yield way
    finally:
        way.end_pass()
        for route in routes:
            route.leave()


class Destination:
    """Where the calls of one block go: to the base (None), or each example to an adapter.

    registries: of the adapters that the block was entered with. groups: (adapter, how many examples), in the sorted order.
    """

    def __init__(self, chosen: list[str | None] | None, registries: dict[str, Registry]):
        self.registries = registries
        self.ran: set[int] = set()
        self.choose(chosen)

    def choose(self, chosen: Sequence[str | None] | None) -> None:
        """Send the examples of the next batch through these adapters, of those that the block was entered with, or the base.

        Raises:
            UserError: an adapter that the block was not entered with.
        """
        self.end_pass()
        self.chosen = chosen if chosen is None else list(chosen)
        self._orders: dict = {}
        if chosen is None:
            return
        if unknown := sorted({name for name in self.chosen if name is not None} - self.registries.keys()):
            entered = listed(sorted(self.registries))
            raise UserError(f"chosen names {listed(map(repr, unknown))}; this block was entered with {entered}")
        places = {name: [i for i, other in enumerate(self.chosen) if other == name] for name in dict.fromkeys(self.chosen)}
        self.groups = [(name, len(members)) for name, members in places.items()]
        self._sorted = [i for members in places.values() for i in members]

    def arrive(self, module: nn.Module, x: Tensor) -> None:
        """A layer is called. The first call, and one of a layer that ran already, begins a forward of the model, in which all
        parameters of these adapters are looked at once, as the adapter in use is (`layers/registry.py`)."""
        if not self.ran or id(module) in self.ran:
            self.end_pass()
            for registry in self.registries.values():
                registry.enter(not torch.is_grad_enabled() and few_tokens((x,)))
        self.ran.add(id(module))

    def end_pass(self) -> None:
        """What was looked at in this forward may change from here on."""
        if self.ran:
            for registry in self.registries.values():
                registry.leave()
        self.ran = set()

    def order(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(the examples' indices sorted by adapter, each example's place among them), on x's device; None: sorted already."""
        if len(x) != len(self.chosen):
            raise UserError(f"the batch has {len(x)} examples, chosen names {len(self.chosen)}; give one name for each example")
        if self._sorted == list(range(len(x))):
            return None, None
        if x.device not in self._orders:
            order = torch.tensor(self._sorted, device=x.device)
            self._orders[x.device] = order, order.argsort()
        return self._orders[x.device]


class Route:
    """Stands in a layer's `forward` while some thread goes another way; other threads find the layer's own behind it."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.slot = "_old_forward" if "_old_forward" in vars(module) else "forward"
        self.before = vars(module).get(self.slot)
        self.ways: dict[int, list] = {}

    @classmethod
    def of(cls, module: nn.Module) -> Route:
        with placing:
            held = next((vars(module)[s] for s in ("_old_forward", "forward") if isinstance(vars(module).get(s), Route)), None)
            if held is None:
                held = cls(module)
                setattr(module, held.slot, held)
            held.ways.setdefault(threading.get_ident(), [])
            return held

    def enter(self, way: Destination, shadows: dict) -> None:
        mine = self.ways[threading.get_ident()]
        if mine:
            mine[-1][0].end_pass()
        mine.append((way, shadows))

    def leave(self) -> None:
        with placing:
            mine = self.ways.get(threading.get_ident(), [])
            if mine:
                mine.pop()
            if not mine:
                self.ways.pop(threading.get_ident(), None)
            if not self.ways:
                if self.before is None:
                    delattr(self.module, self.slot)
                else:
                    setattr(self.module, self.slot, self.before)

    def __call__(self, *args, **kwargs):
        return self.run(*args, **kwargs)

    @outside_compile  # whose thread it is cannot be traced
    def run(self, *args, **kwargs):
        mine = self.ways.get(threading.get_ident())
        if not mine:
            own = self.before or type(self.module).forward.__get__(self.module)
            return own(*args, **kwargs)
        way, shadows = mine[-1]
        if way.chosen is None:
            return plain_forward(self.module, *args, **kwargs)
        x, *rest = args or (kwargs.pop("input"),)
        way.arrive(self.module, x)
        order, back = way.order(x)
        x = x if order is None else x[order]
        sizes = [size for _, size in way.groups]
        shared = None
        if not torch.is_grad_enabled() and len(sizes) > 1 and any(finishes(layer) for layer in shadows.values()):
            shared = plain_forward(self.module, x, *rest, **kwargs).split(sizes)  # one product for the examples of all adapters
        parts = []
        for i, ((name, _), part) in enumerate(zip(way.groups, x.split(sizes), strict=True)):
            layer, plain = shadows.get(name), None if shared is None else shared[i]
            if layer is None:
                parts.append(plain_forward(self.module, part, *rest, **kwargs) if plain is None else plain)
            elif plain is not None and finishes(layer):
                parts.append(layer.adapted.kind.finish(layer, part, plain))
            else:
                parts.append(type(layer).forward(layer, part, *rest, **kwargs))
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out if back is None else out[back]


def finishes(layer: nn.Module) -> bool:
    """Is its output made from the plain layer's?"""
    return layer.adapted.kind.finishes(layer.adapted)


def plain_forward(module: nn.Module, *args, **kwargs):
    """The layer's forward without an adapter."""
    cls = getattr(type(module), "plain_class", type(module))
    return cls.forward(module, *args, **kwargs)


def _check_mixable(model: nn.Module, layers) -> None:
    kinds = {name: getattr(layer_at(model, name), "adapted", None) for name in layers}
    bad = [name for name, weight in kinds.items() if weight is not None and not weight.kind.batch_first]
    if bad:
        raise UserError(f"{listed(bad)}: its input need not have the batch in front; leave it out of adapters that are mixed")
