"""Oracles that know public names only: freshly attached copies whose values were loaded normally, in their own dtype or in float64.

A fresh copy has nothing that could be stale, and float64 has digits to spare, so both show what a used model of the working dtype
should say. That the layers are right at all is `reference.py`'s business.
"""

import torch
from torch import nn

import doratune

WIDTH, MIDDLE = 32, 24

CASES = {
    "dora": {},
    "dora, full": {"norm_gradient": "full"},
    "dora, input": {"magnitude_axis": "input"},
    "dora, input, full": {"magnitude_axis": "input", "norm_gradient": "full"},
    "dora, relative": {"magnitude_form": "relative"},
    "dora, pissa": {"start": "pissa"},
    "dora, olora": {"start": "olora"},
    "magnitude only": {"targets": [], "magnitude_only": ["0", "1"]},
    "dvora": {"method": "dvora"},
    "dvora, input": {"method": "dvora", "magnitude_axis": "input"},
    "dloha": {"method": "dloha"},
    "dlokr": {"method": "dlokr"},
    "lora": {"method": "lora"},
    "lora, pissa": {"method": "lora", "start": "pissa"},
    "vera": {"method": "vera"},
    "loha": {"method": "loha"},
    "lokr": {"method": "lokr"},
}
FEW = ("dora", "dora, input", "dora, pissa", "dvora", "dlokr", "lora", "lokr", "magnitude only")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-12}


def config(case, **more):
    return doratune.AdapterConfig(**{"rank": 3, "alpha": 5.0, "targets": ["0", "1"]} | CASES[case] | more)


def plain_chain(dtype=torch.float32, bias=True):
    """Two linear layers with nothing between, so that a layer's error is seen at the end."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, MIDDLE, bias=bias), nn.Linear(MIDDLE, WIDTH, bias=bias)).to(dtype)


def chain(case, dtype=torch.float32, bias=True, **more):
    """An adapted chain away from its start."""
    return moved(doratune.attach(plain_chain(dtype, bias), config(case, **more)))


@torch.no_grad()
def moved(model, seed=0):
    """Every trainable number of every adapter a good step away from where it was."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in doratune.adapters(model):
        for name, p in layer.named_parameters(recurse=False):
            if name.startswith("magnitude") and name != "magnitude_delta":
                p.mul_(1 + 0.4 * torch.rand(p.shape, generator=generator) - 0.1) if p.requires_grad else None
            elif p.requires_grad:
                p.add_(0.15 * torch.randn(p.shape, generator=generator))
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def values(model):
    """Copies of all values, by name."""
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def fresh(case, state, dtype=torch.float32, bias=True, **more):
    """A copy built from nothing that holds these values."""
    model = doratune.attach(plain_chain(dtype, bias), config(case, **more))
    model.load_state_dict(state)
    return model


def outputs(model, tokens=(1, 4, 8), dtype=torch.float32):
    """The outputs for some sizes of input, without gradients."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        return [model(torch.randn(n, WIDTH, generator=generator).to(dtype)).clone() for n in tokens]


def gradients(model, x, dY=None):
    """{"y", "x" and each trained parameter's name: its gradient}; gradients of parameters that had some are put back to None."""
    x = x.detach().clone().requires_grad_()
    y = model(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y) if dY is None else dY)
    found = {"y": y.detach().clone(), "x": x.grad}
    for name, p in model.named_parameters():
        if p.grad is not None:
            found[name.removeprefix("_orig_mod.")], p.grad = p.grad.clone(), None
    return found


def error(got, want):
    """Relative error in the norm; of several tensors, the largest."""
    if isinstance(want, dict):
        assert got.keys() == want.keys(), sorted(got.keys() ^ want.keys())
        return max(error(got[key], want[key]) for key in want)
    if isinstance(want, list | tuple):
        return max(error(a, b) for a, b in zip(got, want, strict=True))
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()
