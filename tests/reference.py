"""Dense DoRA in float64, written from the paper; shares no code with the package. Everything is compared with it.

    V = W + s·B·A,   W' = m·V/|V| per output row (or input column),   y = x·W'ᵀ + bias            (Eq. 5)

`detached` treats |V| as a constant in the backward pass (Eq. 11). Rows without a direction (w <= 1e-6 · median w) keep W' = V.
LoRA is m = None, magnitude only is A = B = None.
"""

import torch


def along(axis):
    return 1 if axis == "output" else 0


def row_norm(V, axis):
    return V.square().sum(along(axis)).sqrt()


def directionless(W, axis):
    w = row_norm(W, axis)
    return w <= 1e-6 * w.median()


def norm(W, A, B, s, axis="output"):
    V = W.double() if A is None else W.double() + s * B.double() @ A.double()
    return row_norm(V, axis)


def merged(W, A, B, m, s, axis="output", full=False):
    """W' in the dtype of its inputs; float64 inputs make it the reference, others the dense peer in that dtype."""
    V = W if A is None else W + s * (B @ A)
    if m is None:
        return V
    frozen = directionless(W.detach().double(), axis)
    n = row_norm(V if full else V.detach(), axis)
    g = torch.where(frozen, torch.ones_like(m), m / torch.where(frozen, torch.ones_like(n), n))
    return V * g.unsqueeze(along(axis)).to(V.dtype)


def forward(x, W, bias, A, B, m, s, axis="output", full=False):
    return torch.nn.functional.linear(x, merged(W, A, B, m, s, axis, full), bias)


def gradients(x, dY, W, bias, A, B, m, s, axis="output", full=False, dtype=torch.float64):
    """(y, {x, A, B, m: gradient}) with everything computed densely in `dtype`."""
    leaves = {"x": x, "A": A, "B": B, "m": m}
    leaves = {k: None if t is None else t.detach().to(dtype).requires_grad_() for k, t in leaves.items()}
    bias = None if bias is None else bias.to(dtype)
    y = forward(leaves["x"], W.to(dtype), bias, leaves["A"], leaves["B"], leaves["m"], s, axis, full)
    y.backward(dY.to(dtype))
    return y.detach(), {k: t.grad for k, t in leaves.items() if t is not None}
