"""Merging an adapter that was trained on a quantized base (QDoRA, §6.1): three results, and what each changes.

    dequantized   W' = g ⊙ (Q(W) + s·B·A) in 16 bit: what was trained, to rounding
    original      the same onto the unquantized W: without the quantization's error, but not the model that was trained
    same          W' quantized again as the base was: as small, with a new quantization error

Each says how far the logits of what was written are from base + adapter as they were trained. The model that is written is never
run before: bitsandbytes repacks a 4-bit layer in its first evaluation on a CPU, and saves it so. Cost: the whole model in memory.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import torch

from ..adapter.attach import record_of
from ..adapter.merge import merge
from ..adapter.stored import Stored
from ..bases import dense_weight
from ..data.image_reader import load_reader
from ..errors import UserError
from ..layers import kind_of
from ..publishing.card import write_merged_card
from ..support.examples import candidates
from ..support.files import read_json
from ..support.folders import new_folder, refuse_existing
from ..support.image_heads import head_of
from ..support.image_models import load_processor
from ..support.model_folders import class_record
from ..support.models import load_tokenizer, quiet_loading
from ..support.transformers4 import readable_by_both
from .adapter import OWN, load
from .base_model import load_base
from .logits import SENTENCES, distance
from .merge import merge_checkpoint

INTO = ("dequantized", "original", "same")


@dataclass(frozen=True)
class MergeDifference:
    """Relative RMS difference of the logits to base + adapter as trained, and the share of positions with the same top token."""

    into: str
    error: float
    same_top_token: float

    def __str__(self) -> str:
        same = f"same top token at {100 * self.same_top_token:.1f} % of positions"
        return f"merged ({self.into}): logits differ from the quantized base + adapter by {self.error:.2g} (relative), {same}"


def recorded_quantization(adapter: str | Path) -> dict | None:
    """How the base was quantized when the adapter was trained, in transformers' terms; None: it was not."""
    path = Path(adapter) / OWN
    return read_json(path, "it belongs to the adapter folder").get("quantization") if path.is_file() else None


def merge_quantized(
    base: str,
    adapter: str | Path,
    output: str | Path,
    into: str = "dequantized",
    dtype: str = "bfloat16",
    overwrite: bool = False,
    check: bool = True,
    check_base: bool = True,
) -> MergeDifference | None:
    """Write the merged model to `output`, whole or not at all; check: compare what was written (None: not compared); check_base: as
    `load`.

    Raises:
        UserError: the adapter records no quantization, or does not fit; an output folder that exists.
    """
    quantization = recorded_quantization(adapter)
    if quantization is None:
        raise UserError(f"{adapter} was trained on a base that is not quantized; merge it without --into")
    refuse_existing(Path(output), overwrite)
    if into == "original":
        merge_checkpoint(base, adapter, output, dtype, overwrite, check_base=check_base)
    else:
        _merge_in_memory(base, adapter, Path(output), into, dtype, overwrite, quantization, check_base)
    if not check:
        return None
    model = load(load_base(base, adapter, dtype, quantization), adapter, check_base=False)
    inputs = _inputs(model, base)
    trained = logits(model, inputs)
    del model
    gc.collect()
    result = logits(load_base(str(output), dtype=dtype), inputs)
    same = (result.argmax(-1) == trained.argmax(-1)).double().mean().item()
    return MergeDifference(into, distance(result, trained), same)


def _merge_in_memory(
    base: str, adapter, output: Path, into: str, dtype: str, overwrite: bool, quantization: dict, check_base
) -> None:
    model = load(load_base(base, adapter, dtype, quantization), adapter, check_base=check_base)
    method = record_of(model).config.method
    merge(model, keep="none", quantized="same" if into == "same" else "dense")
    if into == "dequantized":
        dequantize(model)
    with new_folder(output, overwrite, key="config.json") as folder:
        _write(model, _processor(model, base), folder, dense=into == "dequantized")
        write_merged_card(folder, base, adapter, method, name=output.name)


@torch.no_grad()
def dequantize(model) -> None:
    """Make every layer that is still quantized an ordinary nn.Linear in the model's dtype, in place."""
    for module in list(model.modules()):
        kind = kind_of(module)
        base = None if kind is None else kind.base(module)
        if base is not None and not base.writable:
            Stored(module).make_dense(module, dense_weight(base, module, model.dtype))


@torch.no_grad()
def logits(model, inputs: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """A row for each position of a text, for each image, or for each pixel."""
    on_device = ({name: t.to(model.device) for name, t in one.items()} for one in inputs)
    outputs = (model(**one).logits for one in on_device)
    rows = (scores.movedim(1, -1) if scores.dim() == 4 else scores for scores in outputs)  # of pixels: (N, C, H, W)
    return torch.cat([scores.flatten(0, -2).float().cpu() for scores in rows])


def _processor(model, base: str):
    """What is saved beside a model of this class."""
    return load_processor(base) if head_of(class_record(model)["class"]) else load_reader(base)


def _inputs(model, base: str) -> list[dict[str, torch.Tensor]]:
    """Sentences, or for an image model an input made from its config."""
    if head_of(class_record(model)["class"]):
        return [next(candidates(model))]
    tokenizer = load_tokenizer(base)
    return [{"input_ids": tokenizer(sentence, return_tensors="pt")["input_ids"]} for sentence in SENTENCES]


def _write(model, tokenizer, folder: Path, dense: bool) -> None:
    """save_pretrained of a merged model; dense: nothing is quantized any more."""
    if dense:
        for owner, leftover in ((model.config, "quantization_config"), (model, "hf_quantizer")):
            if hasattr(owner, leftover):
                delattr(owner, leftover)
        model.is_quantized = False
    with quiet_loading():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    readable_by_both(folder)
