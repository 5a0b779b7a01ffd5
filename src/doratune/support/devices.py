"""The device that a command computes on: the one that is named, or what torch can use here.

An accelerator is what torch calls one (`torch.accelerator`): CUDA and ROCm are `cuda`, Apple's is `mps`, Intel's is `xpu`.
Which card of several is said as usual, by CUDA_VISIBLE_DEVICES. Cost: nothing is allocated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ..errors import UserError

if TYPE_CHECKING:
    import torch

Device = Literal["auto", "cpu", "cuda", "mps", "xpu"]
"""What --device may be."""


def device_of(name: str) -> torch.device:
    """`auto` is the accelerator where there is one, else the CPU.

    Raises:
        UserError: an accelerator that is not here.
    """
    import torch  # not with the settings of a command, for which --help asks

    if name == "cpu":
        return torch.device("cpu")
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return here or torch.device("cpu")
    if here is None or here.type != name:
        present = f"has {here.type}" if here else "has no accelerator"
        raise UserError(
            f"device is {name!r}, but torch {torch.__version__} {present} here; give --device auto, or see doratune doctor"
        )
    return here
