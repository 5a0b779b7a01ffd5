"""One call of an adapted layer: three ways through the same maths, for every layer kind.

With gradients `math/autograd.py`, without them `infer` with ready factors, under torch.compile the ops of `math/op.py`.
A layer kind makes the base's output and hands it over as rows (T, O):

    composed    linear layers: the low-rank product and the gain in two passes over the output
    rescaled    every other kind: `out` holds x·Wᵀ + s·ΔV(x) already, the gain is all that is left
    scaled_input    the input axis: x̃ = g ⊙ x in front of the layer
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..math import op
from ..math.autograd import Compose, ScaleInput
from ..math.compose import infer
from .site import Adaptation


def composed(module, x_TI: Tensor | None, out_TO: Tensor, A, B, m, bias, dropout=(None, 1.0), site=None) -> Tensor:
    """y (T, O) = out + (g − 1) ⊙ (out − bias) + x·Aᵀ·(s·g ⊙ B)ᵀ; see `math.compose.Inputs`.

    dropout: (mask of kept inputs, keep); site: the layer in this call, where the caller has it already."""
    a, (mask, keep) = module.adaptation, dropout
    gradients = torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        return _traced(a, x_TI, out_TO, A, B, m, bias, mask, keep, gradients)
    site = site or module.op_site(gradients, count=True)
    if gradients or mask is not None or torch.autograd.forward_ad._current_level >= 0:  # forward mode raises there
        return Compose.apply(x_TI, out_TO, A, B, m, bias, mask, keep, site)
    return infer(site, x_TI, out_TO, A, B, m, bias)


def rescaled(module, out: Tensor, A, B, m, bias: Tensor | None, dim: int = -1, site=None) -> Tensor:
    """out + (g − 1) ⊙ (out − bias), g along dimension `dim` of an output that holds the low-rank part already."""
    if A is not None and not module.adaptation.full_gradient:
        A, B = A.detach(), B.detach()  # the norm is a constant, and nothing else here depends on them
    if dim not in (-1, out.dim() - 1) and out.is_contiguous():
        lying = math.prod(out.shape[:dim]), out.shape[dim], math.prod(out.shape[dim + 1 :])
        y = composed(module, None, out.reshape(lying), A, B, m, bias, site=site)
        return y.view(out.shape)
    moved = out.movedim(dim, -1)
    y = composed(module, None, flat(moved), A, B, m, bias, site=site)
    return y.view(moved.shape).movedim(-1, dim)


def scaled_input(module, site, x: Tensor, A, B, m) -> Tensor:
    """x̃ of the input axis: g ⊙ x along the last dimension; site: None under torch.compile."""
    x_TI, dtype = flat(x), compute_dtype(x)
    if site is None:
        handle = module.adaptation.handle.tensor
        return op.scaled_input(x_TI, A, B, m, dtype, handle, torch.is_grad_enabled())[0].view(x.shape)
    return ScaleInput.apply(x_TI, A, B, m, site, dtype).view(x.shape)


def _traced(a: Adaptation, x_TI, out_TO, A, B, m, bias, mask, keep: float, gradients: bool) -> Tensor:
    """What torch.compile sees: the opaque op, or for a direction alone plain products that it can fuse."""
    if m is not None:
        return op.compose(x_TI, out_TO, A, B, m, bias, mask, keep, a.handle.tensor, gradients)[0]
    dtype = out_TO.dtype
    with torch.autocast(out_TO.device.type, enabled=False):
        x_TI = x_TI.to(dtype) if mask is None else x_TI.to(dtype) * mask
        return out_TO + (x_TI @ A.to(dtype).T) @ (B.to(dtype) * (a.scaling / keep)).T


def dropout_mask(module, x_TI: Tensor | None) -> tuple[Tensor | None, float]:
    """(which inputs of the low-rank branch are kept, or None for all; the share that is)."""
    p = module.adaptation.dropout
    if not p or not module.training or x_TI is None:
        return None, 1.0
    return torch.empty_like(x_TI, dtype=torch.bool).bernoulli_(1.0 - p), 1.0 - p


def flat(x: Tensor) -> Tensor:
    """(T, I), also where a size is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def outside_compile(function):
    """`function`, run as it is where torch.compile traces its caller: a break in the graph."""
    disabled = torch._disable_dynamo(function)  # torch.compiler.disable would import the compiler right here

    @functools.wraps(function)
    def run(*args, **kwargs):
        return (disabled if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return run


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the layer will compute: autocast's, or the input's."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
