"""Text: causal language models of transformers, in sequences of one length, with the logits that training keeps."""

from __future__ import annotations

import torch
from torch import nn

from ...data.encode import AnswerCollator
from ...support.models import quiet_loading, readable_errors
from ...training.objectives import DEFAULT
from . import Workload


class TextWorkload(Workload):
    """Language models."""

    objective = DEFAULT

    @classmethod
    def takes(cls, config) -> bool:
        from transformers import AutoModelForImageTextToText

        return type(config) not in AutoModelForImageTextToText._model_mapping

    def skeleton(self) -> nn.Module:
        from transformers import AutoModelForCausalLM

        return self.built(AutoModelForCausalLM)

    def built(self, auto: type) -> nn.Module:
        recipe = self.recipe
        with quiet_loading(), readable_errors(recipe.model), torch.device("meta"):
            return auto.from_config(self.config, dtype=self.dtype, trust_remote_code=recipe.trust_remote_code)

    def inputs(self, model, examples, length, answer):
        return text_inputs(model, examples, length, answer)


def text_inputs(model: nn.Module, examples: int, length: int, answer: int | None) -> dict:
    """What the collator of training hands to a language model, for sequences of one length.

    Args:
        answer: positions whose logits are computed; None: all.
    """
    keep, accepted = min(length, answer or length), AnswerCollator(0, model)
    ones = torch.ones(examples, length, dtype=torch.long)
    inputs = {"input_ids": ones, "attention_mask": torch.ones_like(ones)}
    if accepted.positions:
        inputs["position_ids"] = torch.ones_like(ones)
    if accepted.keeps_logits:
        inputs["logits_to_keep"] = keep
    labels = torch.ones(examples, keep if accepted.keeps_logits else length, dtype=torch.long)
    return inputs | {"labels": labels, "num_items_in_batch": torch.ones(())}


WORKLOAD = TextWorkload
