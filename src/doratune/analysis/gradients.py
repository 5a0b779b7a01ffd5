"""What a gradient changes (§4.2): its share along the vectors of W (magnitude) and across them (direction).

For the gradient G of the loss by a weight W (O, I): per row, along = (G·W/w²)·W, across = G − along;

    share = Σ|along|² / Σ|G|²      of a step along G that only stretches

A random gradient has a share of 1/I. DoRA's gradient by V (Eq. 6), m/n·(G − along) with the full norm gradient, has 0: m alone
stretches. With the detached norm gradient, and for LoRA, it has G's own share.

Cost: of `magnitude_share` one pass over G in tiles. Of `gradient_shares` one forward and backward pass; each gradient is reduced to
two numbers and dropped as soon as it is there, so that one or two weights' gradients are held at a time, never all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..adapter.attach import RECORD, adapters
from ..adapter.merge import merge, unmerge
from ..errors import UserError, listed
from ..layers import kind_of
from .change import tiles
from .points import module_name


@torch.no_grad()
def magnitude_share(weight: Tensor, gradient: Tensor, magnitude_axis: str = "output") -> float:
    """Share of a gradient (O, I) that changes magnitudes, from 0 (turns only) to 1 (stretches only).

    Raises:
        UserError: shapes that differ, or a gradient of zeros.
    """
    if weight.shape != gradient.shape:
        raise UserError(f"weight and gradient have shapes {tuple(weight.shape)} and {tuple(gradient.shape)}; expected one shape")
    along, total = _energies(weight, gradient, magnitude_axis)
    if not total > 0:
        raise UserError("the gradient is 0; run a backward pass first")
    return along / total


def _energies(weight: Tensor, gradient: Tensor, axis: str) -> tuple[float, float]:
    """(Σ|along|², Σ|G|²) in float64."""
    W, G = weight.flatten(1), gradient.flatten(1)
    along = total = torch.zeros((), dtype=torch.float64, device=W.device)
    for W_KI, G_KI in tiles(*((W.T, G.T) if axis == "input" else (W, G))):
        W_KI, G_KI = W_KI.double(), G_KI.double()
        along = along + ((W_KI * G_KI).sum(1).square() / W_KI.square().sum(1).clamp_min(1e-300)).sum()
        total = total + G_KI.square().sum()
    return along.item(), total.item()


def gradient_shares(
    model: nn.Module,
    loss: Mapping | Callable[[nn.Module], Tensor],
    modules: Sequence[str] = (),
    magnitude_axis: str = "output",
) -> dict[str, float]:
    """{layer: share of the loss's gradient by its weight that changes magnitudes}, from a real backward pass.

    Of an attached model: by the weight W' that its layers have at the moment, for which they are merged and unmerged again (bit for
    bit), along their own axis. The model is left as it was: `requires_grad`, gradients, adapter; its mode (dropout) is not touched.

    Args:
        loss: a batch with labels, for a model that returns a `.loss`; or a function from the model to a scalar.
        modules: last names (q_proj), or whole names; none: the adapted layers, without an adapter all with a dense matrix.
        magnitude_axis: of models without an adapter.

    Returns:
        Layers that the loss does not depend on are left out, as are batched experts and packed attention weights.

    Raises:
        UserError: no such module, or a loss that is no finite scalar.
    """
    record = vars(model).get(RECORD)
    axes = {name: layer.adapted.axis for name, layer in adapters(model)} if record is not None and record.merged is None else {}
    if axes:
        merge(model)
    try:
        names = axes or {name: magnitude_axis for name, _ in model.named_modules()}
        wanted = {name: axis for name, axis in names.items() if not modules or name in modules or module_name(name) in modules}
        layers = {name: layer for name in wanted if (layer := _dense(model, name)) is not None}
        if not layers:
            raise UserError(f"no layer with a dense weight is named {listed(modules)}; name modules as q_proj")
        return _shares(model, loss, layers, wanted)
    finally:
        if axes:
            unmerge(model)


def _dense(model: nn.Module, name: str) -> nn.Module | None:
    """The module, where it has a matrix that autograd can reach."""
    try:
        module = model.get_submodule(name)
    except AttributeError:  # a batched expert
        return None
    weight = getattr(module, "weight", None)
    fits = isinstance(weight, nn.Parameter) and weight.dim() > 1 and weight.is_floating_point()
    return module if fits else None


def _shares(model: nn.Module, loss, layers: dict[str, nn.Module], axes: Mapping[str, str]) -> dict[str, float]:
    shares: dict[str, float] = {}

    def reduce(name: str, module: nn.Module, p: Tensor) -> None:
        kind, gradient = kind_of(module), p.grad
        p.grad = None
        W, G = (t.detach() if kind is None else kind.matrix(t.detach()) for t in (p, gradient))
        along, total = _energies(W, G, axes[name])
        if total != 0:  # NaN is said below
            shares[name] = along / total

    with _only(model, [module.weight for module in layers.values()]), contextlib.ExitStack() as hooks:
        seen: set[int] = set()
        for name, module in layers.items():
            if id(module.weight) not in seen:  # a tied weight has one gradient
                seen.add(id(module.weight))
                handle = module.weight.register_post_accumulate_grad_hook(lambda p, n=name, m=module: reduce(n, m, p))
                hooks.callback(handle.remove)
        with torch.enable_grad():
            value = model(**loss).loss if isinstance(loss, Mapping) else loss(model)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad or not torch.isfinite(value):
            raise UserError("the loss is no finite number that depends on the layers; give a batch with labels, or a function")
        value.backward()
    if broken := [name for name, share in shares.items() if share != share]:
        raise UserError(f"{listed(broken)}: the gradient holds NaN or infinite values; measure in float32")
    return {name: shares[name] for name in layers if name in shares}


@contextlib.contextmanager
def _only(model: nn.Module, weights: list[nn.Parameter]) -> Iterator[None]:
    """Gradients for these weights and no others; afterwards `requires_grad` and kept gradients are what they were."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for p, _, _ in before:
            p.requires_grad_(False)
            p.grad = None
        for p in weights:
            p.requires_grad_(True)
        yield
    finally:
        for p, required, gradient in before:
            p.requires_grad_(required)
            p.grad = gradient


def batch_of(data: str, model: nn.Module, tokenizer, count: int = 16, max_length: int = 512) -> dict:
    """The first items of training data as one batch, as `doratune train` would make it.

    Raises:
        UserError: see `training.data.load_items`; fewer than one item asked for.
    """
    from ..data import encoder, load_items
    from ..data.encode import AnswerCollator, encode_all
    from ..data.limits import check_tokens

    if count < 1:
        raise UserError(f"gradient_items is {count}; give 1 or more")
    items, kind = load_items(data)
    rows, _ = encode_all(items[:count], encoder(kind), tokenizer, max_length)
    check_tokens(model, tokenizer, (row["input_ids"] for row in rows))
    return AnswerCollator(tokenizer.pad_token_id, model)(rows)
