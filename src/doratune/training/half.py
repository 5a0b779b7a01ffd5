"""A scaled loss for what is trained over an fp16 base.

Gradients pass the base in its dtype. In fp16 whatever is below 6e-8 is 0 and below 6e-5 loses bits, and a mean over many answer
tokens makes every token's share that small. The loss is multiplied by a power of two before backward, the gradients are divided
again before they are clipped; a step that overflows is left out and the factor halved (torch's GradScaler). It is accelerate's
own scaler without its autocast, which would compute the base's layers in other dtypes than they are used in. Cost: one pass over
the trained gradients a step.
"""

from __future__ import annotations

import torch
from torch import nn

START = 2.0**12
"""First factor: a larger one brings no gradient nearer to fp32's (SmolLM2 and a six-layer Llama, 64 and 2,048 answer tokens), and
the first steps do not overflow. It grows by itself every 2,000 steps."""


def scale_loss(accelerator, model: nn.Module | None) -> None:
    """Give an accelerator a scaler where the model is in fp16, what is trained is not, and nothing else scales the loss."""
    if model is None or accelerator.scaler is not None or accelerator.mixed_precision == "fp16":
        return
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    if torch.float16 not in {p.dtype for p in model.parameters()} or not trained or torch.float16 in trained:
        return
    accelerator.scaler = torch.amp.GradScaler(accelerator.device.type, init_scale=START)

    def unscale_gradients(optimizer=None) -> None:
        """accelerate's own does nothing unless autocast is on too."""
        chosen = accelerator._optimizers if optimizer is None else optimizer
        for one in chosen if isinstance(chosen, list | tuple) else [chosen]:
            while hasattr(one, "optimizer"):
                one = one.optimizer
            accelerator.scaler.unscale_(one)

    accelerator.unscale_gradients = unscale_gradients
