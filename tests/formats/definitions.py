"""Dense DoRA of whole models, written from the formats' definitions: what a file means is a weight W' for each module, put into a
copy of the base. Shares no code with the package.
"""

import copy
import json

import torch
from safetensors.torch import save_file
from torch import nn

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def numbers(seed=0, scale=0.2):
    """A function from sizes to normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *size: scale * torch.randn(*size, generator=generator)


def norms(V, axis="output"):
    """|V| per output row (O, 1…), or per input channel over everything else (1, I, 1…)."""
    dims = [d for d in range(V.dim()) if d != (0 if axis == "output" else 1)]
    return V.double().square().sum(dims, keepdim=True).sqrt()


def decomposed(W, delta, m, axis="output"):
    """m ⊙ (W + ΔW) / |W + ΔW| in float64; m None: W + ΔW."""
    V = W.double() + delta.double().view(W.shape)
    if m is None:
        return V
    sizes = [-1] + [1] * (V.dim() - 1) if axis == "output" else [1, -1] + [1] * (V.dim() - 2)
    return m.double().reshape(sizes) * V / norms(V, axis)


def magnitude(W, seed, axis="output"):
    """Norms of W, moved by up to a third, in the shape that `norms` has."""
    n = norms(W.detach(), axis).float()
    return n * (1 + 0.3 * torch.rand(n.shape, generator=torch.Generator().manual_seed(seed)))


def with_weights(model, weights):
    """A copy of the model with these weights, by module."""
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in weights.items():
            module = dense.get_submodule(name)
            module.weight.copy_(weight.to(module.weight))
    return dense


def assert_merges_to(model, weights):
    """Merging gives each module the weight that the file defines, to fp32's rounding; none of them is the base's."""
    import doratune

    base = {name: model.get_submodule(name).weight.detach().clone() for name in weights}
    assert {name for name, _ in doratune.adapters(model)} == set(weights)
    doratune.merge(model)
    for name, weight in weights.items():
        merged = model.get_submodule(name).weight.detach().double()
        assert (weight - merged).norm() <= 2e-6 * weight.norm(), name
        assert (weight - base[name]).norm() > 0.05 * weight.norm(), name


class Convolutional(nn.Module):
    """Two convolutions, 3 × 3 and 1 × 1, and a linear layer."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, 1, bias=False)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.second(torch.relu(self.first(x))).mean((2, 3)))


IMAGES = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(9))


def tiny_unet(seed=0):
    """A UNet of diffusers with linear layers in attention and convolutions in its blocks."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def denoised(unet):
    generator = torch.Generator().manual_seed(5)
    x, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 3, 12, generator=generator)
    with torch.no_grad():
        return unet(x, 10, encoder_hidden_states=text).sample


UNET_LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
UNET_CROSS = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
UNET_CONV = "down_blocks.0.resnets.0.conv1"


def write(path, tensors, metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: t.detach().clone().contiguous() for key, t in tensors.items()}, path, metadata=metadata)
    return path


def write_settings(folder, settings):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
