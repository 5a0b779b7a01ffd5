"""A model of several layer kinds and its dense float64 twin, written from the paper out of public parameters alone.

    V = W + ΔV,  W' = m·V/|V| along the magnitude's axis (Eq. 5), rows without a direction keep W' = V

`Twin` has the base's weights as the test knows them and reads A, B, m and the like from the adapted layers, so nothing that the
package derives or remembers can reach it.
"""

import torch
from reference import along, directionless, row_norm
from torch import nn
from torch.nn import functional

import doratune

TOKENS = 12


class Mixed(nn.Module):
    """Embedding, linear layers with and without a bias, a convolution and a transformers Conv1D; ids (N, T) → (N, T, 8)."""

    def __init__(self):
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.embed = nn.Embedding(TOKENS, 8)
        self.up = nn.Linear(8, 12)
        self.conv = nn.Conv1d(12, 12, 3, padding=1)
        self.mix = Conv1D(8, 12)
        self.down = nn.Linear(8, 8, bias=False)
        nn.init.normal_(self.mix.weight, std=0.4)

    def forward(self, ids):
        x = torch.tanh(self.up(self.embed(ids)))
        x = torch.tanh(self.conv(x.mT).mT.contiguous())
        return self.down(torch.tanh(self.mix(x)))


def base_weights(model):
    """{layer: its plain weight as a matrix (O, I) in float64}, of an unmerged model."""
    weights = {name: getattr(model, name).weight.detach().double().clone() for name in ("embed", "up", "conv", "mix", "down")}
    return weights | {"conv": weights["conv"].flatten(1), "mix": weights["mix"].mT.contiguous()}


def update(p, layer):
    """ΔV (O, I) of a layer in float64, from its parameters by name, differentiable in them."""
    s = layer.scaling
    if "start_A" in p:  # PiSSA and OLoRA: the start is taken out again
        return s * (p["lora_B"] @ p["lora_A"] - p["start_B"] @ p["start_A"])
    if "lora_A" in p:
        return s * (p["lora_B"] @ p["lora_A"])
    if "vera_b" in p:
        A, B = (t.double() for t in layer.adapted.direction.shared_tensors().values())
        rows, columns = len(p["vera_b"]), layer.adapted.shape[1]
        return (p["vera_b"][:, None] * B[:rows] * p["vera_d"]) @ A[:, :columns]
    if "hada_w1_a" in p:
        return s * (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])
    if "lokr_w1" in p:
        return s * torch.kron(p["lokr_w1"], p["lokr_w2_a"] @ p["lokr_w2_b"])
    return 0.0


def magnitude(p):
    if "magnitude_delta" in p:
        return p["magnitude_start"] * p["magnitude_delta"].exp()
    return p.get("magnitude")


def merged_weight(W, p, layer, axis, full):
    """W' (O, I) by Eq. 5; the norm is a constant to the backward unless `full`."""
    V, m = W + update(p, layer), magnitude(p)
    if m is None:
        return V
    frozen = directionless(W, axis)
    n = row_norm(torch.where(frozen.unsqueeze(along(axis)), 1.0, V if full else V.detach()), axis)
    g = torch.where(frozen, torch.ones_like(m), m / n)
    return V * g.unsqueeze(along(axis))


def axis_of(name, config):
    if name == "embed":
        return "output" if config.embedding_magnitude == "token" else "input"
    return config.magnitude_axis


def leaves(model):
    """{layer: {parameter: a float64 leaf}} of all adapted layers."""
    own = {name: dict(layer.named_parameters(recurse=False)) for name, layer in doratune.adapters(model)}
    return {
        name: {key: p.detach().double().requires_grad_(p.requires_grad) for key, p in ps.items() if key not in ("weight", "bias")}
        for name, ps in own.items()
    }


def effective(model, config, W, own):
    """{layer: W'}, of every layer."""
    layers, full = dict(doratune.adapters(model)), config.norm_gradient == "full"
    return W | {name: merged_weight(W[name], p, layers[name], axis_of(name, config), full) for name, p in own.items()}


def forward(weights, biases, ids):
    """The model's output in float64."""
    x = torch.tanh(functional.linear(functional.embedding(ids, weights["embed"]), weights["up"], biases["up"]))
    kernel = weights["conv"].view(12, 12, 3)
    x = torch.tanh(functional.conv1d(x.mT, kernel, biases["conv"], padding=1).mT)
    return functional.linear(torch.tanh(functional.linear(x, weights["mix"], biases["mix"])), weights["down"])


def biases_of(model):
    return {name: getattr(model, name).bias.detach().double().clone() for name in ("up", "conv", "mix")}
