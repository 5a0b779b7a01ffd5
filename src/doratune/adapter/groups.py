"""Parameter groups for any torch optimizer: what decays, what learns faster, and m by itself.

output factors   lora_B and its like (the factor that starts at 0) at `output_factor_lr_ratio` times the rate: LoRA+ (Hayou,
                 2024). m is never among them: it is one-dimensional, and an lr 16 times as high destroys it
m                no decay towards 0, which is no meaning of a norm; own rate. In m = m₀·exp(δ) decay on δ pulls m to m₀
whole modules    decay, but for their one-dimensional parameters; own rate, such as LLaVA's for its projector
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import UserError
from ..layers.adapted import own_parameters
from ..layers.fsdp import reshard
from .attach import adapters, record_of
from .foreign import refuse_foreign
from .states import refuse_merged


def parameter_groups(
    model: nn.Module,
    lr: float = 1e-4,
    weight_decay: float = 0.01,
    magnitude_lr_ratio: float = 1.0,
    output_factor_lr_ratio: float = 1.0,
    magnitude_decay: float = 0.0,
    whole_lr_ratio: float = 1.0,
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer, each with a `name`.

    Args:
        magnitude_lr_ratio: m's learning rate over `lr`.
        output_factor_lr_ratio: LoRA+'s ratio, the learning rate of B over that of A; 1: LoRA.
        magnitude_decay: weight decay of δ in m = m₀·exp(δ), which pulls m back to m₀; needs `magnitude_form="relative"`.
        whole_lr_ratio: the learning rate of modules that are trained whole over `lr`.

    Raises:
        UserError: nothing is attached, the adapter is merged, nothing is trainable, or decay asked for a direct magnitude.
    """
    record = record_of(model)
    refuse_foreign(model, "doratune.parameter_groups")
    refuse_merged(record, "training")
    ratios = {"magnitude_lr_ratio": magnitude_lr_ratio, "output_factor_lr_ratio": output_factor_lr_ratio}
    for name, value in (ratios | {"whole_lr_ratio": whole_lr_ratio}).items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise UserError(f"{name} is {value!r}; expected a number of at least 0")
    if magnitude_decay and record.config.magnitude_form != "relative":
        raise UserError("magnitude_decay needs magnitude_form='relative': decay of a direct m would pull it to 0, not to m₀")
    reshard(model)
    groups = _sorted(model)
    if not any(groups.values()):
        raise UserError("nothing is trainable; the adapter was loaded frozen: use doratune.load(..., trainable=True)")
    settings = {
        "factors": {"lr": lr, "weight_decay": weight_decay},
        "output_factors": {"lr": lr * output_factor_lr_ratio, "weight_decay": weight_decay},
        "whole": {"lr": lr * whole_lr_ratio, "weight_decay": weight_decay},
        "whole_vectors": {"lr": lr * whole_lr_ratio, "weight_decay": 0.0},
        "magnitude": {"lr": lr * magnitude_lr_ratio, "weight_decay": magnitude_decay},
    }
    if output_factor_lr_ratio == 1.0:  # one group as ever: optimizer states of earlier versions still fit
        groups["factors"] = groups["factors_in_order"]
        groups["output_factors"] = []
    del groups["factors_in_order"]
    return [{"params": params, "name": name, **settings[name]} for name, params in groups.items() if params]


def _sorted(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Group name → its trainable parameters, in the model's order."""
    names = {id(p): (name, layer.adapted) for _, layer in adapters(model) for name, p in own_parameters(layer).items()}
    groups: dict[str, list] = {
        name: [] for name in ("factors", "output_factors", "factors_in_order", "whole", "whole_vectors", "magnitude")
    }
    for p in model.parameters():
        if not p.requires_grad:
            continue
        name, weight = names.get(id(p), (None, None))
        if name is None:
            groups["whole" if p.dim() > 1 else "whole_vectors"].append(p)
        elif name.startswith("magnitude"):
            groups["magnitude"].append(p)
        else:
            groups["output_factors" if name in weight.direction.output_factors else "factors"].append(p)
            groups["factors_in_order"].append(p)
    return groups
