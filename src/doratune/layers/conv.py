"""Convolutions in one to three dimensions: W (O, I/groups, k…) seen as (O, I/groups·∏k), A (R, I/groups·∏k), B (O, R).

    y = g ⊙ (conv(x, W) + s·conv(x, B·A)) + bias,   n = |W_o + s·B_o·A| per output channel (§3.1, Eq. 5)

conv(x, B·A) is conv(x, A) with the layer's own stride, padding, dilation and groups (A's R filters applied to every group),
then B as a 1 × 1 convolution. The low-rank output is written once and the gain applied in one more pass.

The input axis scales columns of W, each an input channel and a position of the kernel: only where the kernel is 1 × 1 and
there is one group is that a scaled input, as in a linear layer.

Cost: T·R·groups numbers for conv(x, A). Where that is more than ΔV itself (depthwise layers), ΔV's own convolution is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .calls import rescaled, scaled_input
from .kind import LayerKind, differs

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ConvKind(LayerKind):
    name = "Conv"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, CONVS)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def rows(self, weight: Tensor, which, flatten: bool = True) -> Tensor:
        return weight[which].flatten(1) if flatten else weight[which]

    def forward(self, module, base_forward, x: Tensor):
        a = module.adaptation
        (A, B), m = a.factors_of(module), module.magnitude
        channels = x.dim() - module.weight.dim() + 1
        site = None if torch.compiler.is_compiling() else module.op_site(torch.is_grad_enabled(), count=True)
        if m is not None and a.axis == "input":
            scaled = scaled_input(module, site, x.movedim(channels, -1), A, B, m).movedim(-1, channels)
            x, m = scaled.contiguous() if x.is_contiguous() else scaled, None  # the base's kernel depends on the layout
        out = base_forward(x)
        if A is not None:
            out = out + low_rank(module, x, A, B, out.dtype)
        return out if m is None else rescaled(module, out, A, B, m, module.bias, channels, site)

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


def low_rank(module, x: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    """s·conv(x, B·A) in `dtype`."""
    a, kernel, groups = module.adaptation, module.weight.shape[1:], module.groups
    if a.dropout and module.training:
        x = nn.functional.dropout(x, a.dropout)
    with torch.autocast(x.device.type, enabled=False):
        x, A, B = x.to(dtype), A.to(dtype), B.to(dtype) * a.scaling
        positions = x.numel() // max(1, module.in_channels)
        if groups > 1 and positions * len(A) * groups > module.weight.numel():
            return module._conv_forward(x, (B @ A).view(module.weight.shape), None)
        filters = A.view(-1, *kernel)
        z = module._conv_forward(x, filters.repeat(groups, *[1] * len(kernel)) if groups > 1 else filters, None)
        ones = [1] * (len(kernel) - 1)
        convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[len(ones) - 1]
        return convolve(z, B.view(*B.shape, *ones), groups=groups)
