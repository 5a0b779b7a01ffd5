"""Pairs of a DoRA model of PEFT and its accelerated copy, with everything away from the start: B ≠ 0, m ≠ n."""

import copy
import warnings

import peft
import torch
from torch import nn

import doratune


def dora(model, **settings):
    """`model` with PEFT's DoRA."""
    settings = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, "use_dora": True} | settings
    with warnings.catch_warnings():  # of fan_in_fan_out, which PEFT sets right by itself
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    return model if settings["init_lora_weights"] else moved(model)


def moved(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name:
                p.mul_(1 + 0.4 * torch.rand(p.shape, generator=generator).to(p))
            elif "lora_" in name and p.requires_grad:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def pair(model, **settings):
    """(PEFT's model, the same accelerated)."""
    theirs = dora(model, **settings)
    ours = copy.deepcopy(theirs)
    doratune.peft.accelerate(ours)
    return theirs, ours


def error(got, expected):
    """Relative, in the Frobenius norm."""
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def run(model, *inputs, seed=0, **named):
    """(output, {parameter: gradient}) of one call; the random numbers of dropout are those of `seed`."""
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(*inputs, **named)
    output = output if torch.is_tensor(output) else output.logits
    if output.requires_grad:
        generator = torch.Generator().manual_seed(1)
        (output * torch.randn(output.shape, generator=generator).to(output)).sum().backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def differ(theirs, ours, *inputs, **named):
    """The largest relative error of the outputs and of each gradient."""
    (y, gradients), (got, own) = run(theirs, *inputs, **named), run(ours, *inputs, **named)
    assert gradients.keys() == own.keys() and got.dtype == y.dtype
    return max([error(got, y), *(error(own[name], gradient) for name, gradient in gradients.items())])


def no_less_exact(theirs, ours, *inputs, **named):
    """Are outputs and gradients in a low precision as close to the same model in float64 as PEFT's are?"""
    eps = torch.finfo(run(theirs, *inputs, **named)[0].dtype).eps
    truth = run(copy.deepcopy(theirs).double(), *(x.double() if x.is_floating_point() else x for x in inputs), **named)
    (y, gradients), (got, own) = run(theirs, *inputs, **named), run(ours, *inputs, **named)
    assert gradients.keys() == own.keys() and got.dtype == y.dtype
    pairs = [(y, got, truth[0]), *((gradients[name], own[name], truth[1][name]) for name in own)]
    return all(error(b, exact) <= 2 * error(a, exact) + 2 * eps for a, b, exact in pairs)


def ways(model):
    """How many calls of accelerated layers went our way, layer by layer."""
    layers = [module for module in model.modules() if hasattr(module, "layer_weights")]
    return [sum(weight.calls for weight in layer.layer_weights.by_adapter.values()) for layer in layers]


class Around(nn.Module):
    """One layer under the name "layer", with the input brought to its shape, and something after it that keeps no output."""

    def __init__(self, layer, shape):
        super().__init__()
        self.layer, self.shape = layer, shape

    def forward(self, x):
        return torch.tanh(self.layer(x.view(-1, *self.shape) if self.shape else x)) * 2


IDS = torch.arange(1, 17).view(2, 8)
