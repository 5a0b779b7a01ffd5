"""Does the merged model say what base + adapter says? Its outputs on an input, against the dtype's own floor.

A language model with a tokenizer reads a few sentences, any other class an input made from its config (`support/examples.py`).
Reference: base + adapter in fp32. The floor is the error of base + adapter in the result's dtype; merging is right when the merged
model's error is at most twice that. Three models are loaded one after the other.

Of a language model also: how many tokens of base + adapter's greedy answers to these sentences the merged model writes too. Where
two tokens are nearly as likely, rounding W' to 16 bits may turn one into the other. Cost: 16 forward passes a sentence.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..support.examples import candidates, flat_tensors
from ..support.model_folders import TrainedClass, is_causal, load_folder
from ..support.models import load_tokenizer, model_path, torch_dtype
from .adapter import load, read_folder
from .merge import base_folder, trained_shapes, wanted_of

SENTENCES = (
    "The capital of France is",
    "Water boils when it is heated because",
    "def add(a, b):\n    return",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
)
FP32_FLOOR = 1e-5
NEW_TOKENS = 16


@dataclass(frozen=True)
class Agreement:
    """Relative RMS errors of the outputs, and of a language model the share of positions with the same most probable token."""

    merged_error: float
    unmerged_error: float
    merged_to_unmerged: float
    same_top_token: float | None
    greedy: tuple[int, int] | None = None
    """Tokens of greedy answers that are the same up to the first other one, and all of them."""
    dtype: str = "float32"

    @property
    def ok(self) -> bool:
        return self.merged_error <= 2 * self.unmerged_error + FP32_FLOOR

    def __str__(self) -> str:
        verdict = "agree to the dtype's floor" if self.ok else "DISAGREE beyond the dtype's floor"
        what, top = "outputs", ""
        if self.same_top_token is not None:
            what, top = "logits", f"; same top token at {100 * self.same_top_token:.1f} % of positions"
        return (
            f"merged and unmerged {what} {verdict}: relative difference {self.merged_to_unmerged:.2g}; against fp32 merged "
            f"{self.merged_error:.2g}, unmerged {self.unmerged_error:.2g}{top}{self._answers()}"
        )

    def _answers(self) -> str:
        if self.greedy is None:
            return ""
        same, all_of_them = self.greedy
        way = "; --dtype float32 writes the weights without rounding" if same < all_of_them and self.dtype != "float32" else ""
        return f"; of the greedy answers to {len(SENTENCES)} prompts {same} of {all_of_them} tokens stay the same{way}"


def agreement(base: str, adapter: str | Path, merged: str | Path, dtype: str) -> Agreement | None:
    """Compare the merged folder with base + adapter, all in `dtype`, and both with fp32; None where no input could be made.

    Raises:
        UserError: one of the three cannot be loaded.
    """
    folder, want = base_folder(base), wanted_of(Path(adapter))
    ids = _sentences(base) if is_causal(folder, want) else None
    model = _loaded(folder, "float32", want, adapter)
    if ids is None and (example := next((one for one in candidates(model) if _tried(model, one)), None)) is None:
        return None

    def outputs(model: nn.Module) -> Tensor:
        return _outputs(model, example) if ids is None else _logits(model, ids)

    reference = unmerged = outputs(model)
    if dtype != "float32":
        del model
        gc.collect()
        model = _loaded(folder, dtype, want, adapter)
        unmerged = outputs(model)
    texts = None if ids is None else [_continued(model, row) for row in ids]
    del model
    gc.collect()
    model = _loaded(Path(merged), dtype, want, None)
    result = outputs(model)
    same = None if ids is None else (result.argmax(-1) == unmerged.argmax(-1)).double().mean().item()
    return Agreement(
        merged_error=distance(result, reference),
        unmerged_error=distance(unmerged, reference),
        merged_to_unmerged=distance(result, unmerged),
        same_top_token=same,
        greedy=None if texts is None else _same_tokens(model, ids, texts),
        dtype=dtype,
    )


def _sentences(base: str) -> list[Tensor] | None:
    """Ids of the sentences, or None where the folder has no tokenizer."""
    folder = Path(model_path(base))
    if folder.is_dir() and not any(folder.glob("tokenizer*")) and not any(folder.glob("*.model")):
        return None
    tokenizer = load_tokenizer(base)
    return [tokenizer(sentence, return_tensors="pt")["input_ids"] for sentence in SENTENCES]


@torch.no_grad()
def _logits(model: nn.Module, ids: list[Tensor]) -> Tensor:
    return torch.cat([model(input_ids=row).logits[0].float() for row in ids])


@torch.no_grad()
def _continued(model: nn.Module, prompt: Tensor) -> Tensor:
    """A prompt (1, T) and behind it the NEW_TOKENS most probable tokens, one after the other."""
    text = prompt
    for _ in range(NEW_TOKENS):
        text = torch.cat([text, model(input_ids=text).logits[:, -1:].argmax(-1)], dim=1)
    return text


@torch.no_grad()
def _same_tokens(model: nn.Module, prompts: list[Tensor], texts: list[Tensor]) -> tuple[int, int]:
    """(tokens behind the prompts that this model would write too, up to its first other one in each text; all of them)."""
    same = 0
    for prompt, text in zip(prompts, texts):
        written = model(input_ids=text).logits[0, prompt.shape[1] - 1 : -1].argmax(-1)
        same += int((written == text[0, prompt.shape[1] :]).long().cumprod(0).sum())
    return same, NEW_TOKENS * len(texts)


def _loaded(folder: Path, dtype: str, want: TrainedClass, adapter) -> nn.Module:
    shapes = None if adapter is None else trained_shapes(read_folder(Path(adapter))[2])
    model = load_folder(folder, torch_dtype(dtype), want, shapes)
    return model if adapter is None else load(model, adapter, check_base=False)  # the merge has looked at it


def _tried(model: nn.Module, example: dict[str, Tensor]) -> bool:
    """Does the model take this input?"""
    try:
        return _outputs(model, example).numel() > 0
    except UserError:
        raise
    except Exception:  # of any model: no config says all that a forward asks for
        return False


@torch.no_grad()
def _outputs(model: nn.Module, example: dict[str, Tensor]) -> Tensor:
    """All floating-point outputs in one row, in fp32."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = model(**{name: t.to(dtype) if t.is_floating_point() else t for name, t in example.items()})
    parts = [t.float().flatten() for t in flat_tensors(output) if t.is_floating_point()]
    return torch.cat(parts) if parts else torch.zeros(0)


def distance(a: Tensor, b: Tensor) -> float:
    """Relative RMS difference."""
    return ((a - b).square().mean().sqrt() / b.square().mean().sqrt()).item()
