"""Convolutions in one to three dimensions: W (O, I/groups, k…) seen as (O, I/groups·∏k), A (R, I/groups·∏k), B (O, R).

    y = g ⊙ (conv(x, W) + s·conv(x, B·A)) + bias,   n = |W_o + s·B_o·A| per output channel (§3.1, Eq. 5)

conv(x, B·A) is conv(x, A) with the layer's own stride, padding, dilation and groups (A's R filters applied to every group),
then B as a 1 × 1 convolution. The low-rank output is written once and the gain applied in one more pass.

The input axis scales columns of W, each an input channel and a position of the kernel: only where the kernel is 1 × 1 and
there is one group is that a scaled input, as in a linear layer.

Cost: T·R·groups numbers for conv(x, A). Where that is more than ΔV itself (depthwise layers), ΔV's own convolution is taken.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..bases import accumulation_dtype
from .kind import LayerKind, differs
from .weight import compute_dtype

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ConvKind(LayerKind):
    name = "Conv"
    linear = False

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, CONVS)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def rows(self, weight: Tensor, which, flatten: bool = True) -> Tensor:
        return weight[which].flatten(1) if flatten else weight[which]

    def forward(self, layer, x: Tensor) -> Tensor:
        weight = layer.adapted
        if not torch.compiler.is_compiling():
            weight.calls += 1
        channels = x.dim() - layer.weight.dim() + 1
        if weight.magnitude and weight.axis == "input":
            x = weight.scaled_input(x.movedim(channels, -1), compute_dtype(x)).movedim(-1, channels)
        out = layer.base_forward(x)
        if weight.rank:
            out = out + low_rank(weight, layer, x, *weight.low_rank(), out.dtype)
        if weight.magnitude and weight.axis == "output":
            return weight.rescale(out, layer.bias, channels, x)
        return out

    def output_columns(self, weight, x: Tensor, rows: Tensor) -> Tensor:
        """(N, K, S) with the low-rank part, as `rescale` has its output."""
        layer, dtype = weight.layer, accumulation_dtype(weight.dtype)
        x = x if x.dim() == layer.weight.dim() else x[None]
        columns = []
        for which, V_KI in weight.row_tiles(rows):
            if weight.rank:
                A, B = weight.low_rank()
                V_KI = torch.addmm(V_KI, B[which].to(V_KI.dtype), A.to(V_KI.dtype), alpha=weight.scaling)
            columns += [_one_channel(layer, x.to(dtype), row, filter_I) for row, filter_I in zip(which.tolist(), V_KI)]
        return torch.cat(columns, 1).flatten(2)

    def file_tensors(self, module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Filters (R, I, k…), (O, R, 1…), (1, O, 1…)."""
        if "lora_A" not in tensors:
            return tensors
        kernel, ones, given = module.weight.shape[1:], [1] * (module.weight.dim() - 2), dict(tensors)
        given |= {"lora_A": tensors["lora_A"].view(-1, *kernel), "lora_B": tensors["lora_B"].view(*tensors["lora_B"].shape, *ones)}
        return given | ({"magnitude": tensors["magnitude"].view(1, -1, *ones)} if "magnitude" in tensors else {})

    def axis_refusal(self, module: nn.Module) -> str | None:
        """Why the input axis is not defined for this convolution."""
        if module.groups == 1 and all(size == 1 for size in module.kernel_size):
            return None
        return "the input axis scales positions inside the kernel, which only a 1 × 1 convolution in one group can do to its input"

    def probe(self, module: nn.Module) -> str | None:
        weight = module.weight
        if type(module).forward in [cls.forward for cls in CONVS] or weight.is_meta:
            return None
        sizes = [2 + d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        numbers = module.in_channels * torch.Size(sizes).numel()
        x = torch.linspace(-1, 1, numbers).view(1, module.in_channels, *sizes).to(weight)
        return differs(module, (x,), module._conv_forward(x, weight, module.bias), "a plain convolution")


def _one_channel(layer, x: Tensor, row: int, filter_I: Tensor) -> Tensor:
    """conv(x, one filter) (N, 1, …) of a layer that may have groups: the filter's own inputs only."""
    inputs = layer.weight.shape[1]
    group = row // (layer.out_channels // layer.groups)
    alone = copy.copy(layer)
    vars(alone).update(groups=1)
    weight = filter_I.view(1, *layer.weight.shape[1:])
    return type(layer)._conv_forward(alone, x.narrow(1, group * inputs, inputs), weight, None)


def low_rank(weight, module, x: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    """s·conv(x, B·A) in `dtype`."""
    kernel, groups = module.weight.shape[1:], module.groups
    if weight.dropout and module.training:
        x = nn.functional.dropout(x, weight.dropout)
    with torch.autocast(x.device.type, enabled=False):
        x, A, B = x.to(dtype), A.to(dtype), B.to(dtype) * weight.s
        positions = x.numel() // max(1, module.in_channels)
        if groups > 1 and positions * len(A) * groups > module.weight.numel():
            return module._conv_forward(x, (B @ A).view(module.weight.shape), None)
        filters = A.view(-1, *kernel)
        z = module._conv_forward(x, filters.repeat(groups, *[1] * len(kernel)) if groups > 1 else filters, None)
        ones = [1] * (len(kernel) - 1)
        convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[len(ones) - 1]
        return convolve(z, B.view(*B.shape, *ones), groups=groups)
