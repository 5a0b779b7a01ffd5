"""What the model answers to fixed prompts while it is trained: before the first step, then every so many steps.

A prompt is asked as the training data asks (`DataFormat.asking`): in its chat template, its Alpaca prompt, or as it is. Greedy, at
most so many tokens, nothing of the checkpoint's generation config; no random number is drawn, so that training goes on as without.
Cost: the generation, on one process while the others wait.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GenerationConfig, TrainerCallback
from transformers.trainer_callback import ExportableState

from ..data import DataSettings
from ..data.encode import prompt_ids
from ..data.formats import DataFormat
from ..errors import UserError
from ..support.files import read_json
from ..support.models import contiguous_head
from ..support.processes import is_first
from .recipe import TrainRecipe


class FixedPrompts(TrainerCallback, ExportableState):
    """When what a model answers to `sample_prompts` is looked at; a checkpoint takes along the samples so far.

    Args:
        checkpoint: of a run that goes on. say: takes a line for each sample.
    """

    def __init__(self, recipe: TrainRecipe, say: Callable[[str], None], checkpoint: Path | None = None):
        self.recipe, self.say, self.every = recipe, say, recipe.sample_steps
        self.samples: list[dict] = []
        with contextlib.suppress(UserError, KeyError, TypeError):
            if checkpoint is not None:
                state = read_json(checkpoint / "trainer_state.json", "a checkpoint needs it")
                self.samples = list(state["stateful_callbacks"][type(self).__name__]["attributes"]["samples"])

    def sample(self, step: int, model) -> list[dict]:
        """{step, prompt, and what came of it} of each prompt."""
        raise NotImplementedError

    def state(self) -> dict:
        return {"args": {}, "attributes": {"samples": self.samples}}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self._write(0, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if (self.every and state.global_step % self.every == 0) or state.global_step >= state.max_steps:
            self._write(state.global_step, model)

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        if not self.every:
            self._write(state.global_step, model)

    def _write(self, step: int, model) -> None:
        if is_first() and not any(sample["step"] == step for sample in self.samples):
            self.samples += self.sample(step, model)


class SampleWriter(FixedPrompts):
    """Answers of one run.

    Args:
        kind: the format of the training data.

    Raises:
        UserError: a prompt that the template refuses.
    """

    def __init__(
        self, recipe: TrainRecipe, kind: DataFormat, tokenizer, say: Callable[[str], None], checkpoint: Path | None = None
    ):
        super().__init__(recipe, say, checkpoint)
        self.tokenizer = tokenizer
        self.prompts = {prompt: asked(prompt, kind, tokenizer, recipe.reading()) for prompt in recipe.sample_prompts}

    def sample(self, step: int, model) -> list[dict]:
        rows = []
        for prompt, ids in self.prompts.items():
            text = answer(model, self.tokenizer, ids, self.recipe.sample_tokens)
            rows.append({"step": step, "prompt": prompt, "output": text})
            self.say(f"step {step}: {prompt!r} -> {text!r}")
        return rows


def asked(prompt: str, kind: DataFormat, tokenizer, reading: DataSettings) -> list[int]:
    """The tokens of a prompt, as items of this format ask.

    Raises:
        UserError: the template refuses it, or the format asks nothing.
    """
    try:
        return prompt_ids(kind.encode(kind.asking(prompt), tokenizer, reading), tokenizer)
    except UserError as error:
        raise UserError(f"sample_prompts: {prompt[:60]!r}: {error}") from None


@torch.no_grad()
def answer(model, tokenizer, ids: list[int], longest: int) -> str:
    """The greedy answer of a model that may be in training; it is left as it was."""
    training, generation = model.training, model.generation_config
    stops = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    row = torch.tensor([ids], device=model.device)
    try:
        model.eval()
        model.generation_config = GenerationConfig()
        with contiguous_head(model):
            settings = GenerationConfig(max_new_tokens=longest, do_sample=False, use_cache=True, **stops)
            out = model.generate(input_ids=row, attention_mask=torch.ones_like(row), generation_config=settings)
    finally:
        model.generation_config = generation
        model.train(training)
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
