"""DoRA as LoRA + one factor per output row, for engines that can multiply a layer's output:

    W'·x = g ⊙ (W·x + s·B·(A·x)),     y = W'·x + bias

Exact: g = m/|W + s·B·A| is written as numbers, so that an engine needs no norm. g is 1 on rows without direction.

    lora_scale.safetensors    <layer>.lora_A (K, I), <layer>.lora_B (O, K), <layer>.output_scale (O,), fp32; and the definition
    lora_scale.json           the same definition, and for each layer its scaling s, rank and shape

Cost: one pass over the adapted weights; as large as the adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .. import __version__
from ..errors import UserError
from ..support.files import write_json, write_tensors
from ..support.folders import new_folder
from .layers import AdaptedMatrix, adapted_layers
from .weights import Weights

TENSORS, DESCRIPTION = "lora_scale.safetensors", "lora_scale.json"
DEFINITION = "y = output_scale * (W @ x + scaling * lora_B @ (lora_A @ x)) + bias"


@dataclass(frozen=True)
class ScaledExport:
    """What was written."""

    folder: Path
    layers: int
    largest_scale: float
    smallest_scale: float

    def __str__(self) -> str:
        return (
            f"{self.folder}: {self.layers} layers, output scales from {self.smallest_scale:.4g} to {self.largest_scale:.4g}; "
            f"exact: {DEFINITION}"
        )

    def to_dict(self) -> dict:
        return {"layers": self.layers, "smallest_scale": self.smallest_scale, "largest_scale": self.largest_scale}


def export_scaled(
    base: str, adapter: str | Path, output: str | Path, overwrite: bool = False, check_base: bool = True
) -> ScaledExport:
    """Write `output`, whole or not at all; check_base: as `doratune.load`.

    Raises:
        UserError: an adapter that does not fit the base; what this form cannot say: the input axis, embeddings (which multiply
            nothing), modules that were trained whole.
    """
    weights, tensors, layers = Weights(base, adapter, check_base), {}, {}
    refuse_whole(weights, "LoRA + output scale")
    for layer in adapted_layers(weights):
        _refuse(layer)
        tensors |= {f"{layer.name}.{name}": t for name, t in _tensors(layer).items()}
        layers[layer.name] = {
            "scaling": layer.scaling,
            "rank": 0 if layer.A is None else len(layer.A),
            "shape": list(layer.W.shape),
        }
    scales = [t for name, t in tensors.items() if name.endswith(".output_scale")]
    facts = {"definition": DEFINITION, "base_model": base, "doratune_version": __version__}
    with new_folder(Path(output), overwrite) as folder:
        write_tensors(folder / TENSORS, tensors, {**facts, **{f"{n}.scaling": repr(v["scaling"]) for n, v in layers.items()}})
        write_json(folder / DESCRIPTION, facts | {"layers": layers})
    largest, smallest = max(t.max().item() for t in scales), min(t.min().item() for t in scales)
    return ScaledExport(Path(output), len(layers), largest, smallest)


def refuse_whole(weights: Weights, form: str) -> None:
    """Modules trained whole are no part of a low-rank form."""
    if weights.plan.replaced:
        names = sorted({key.rsplit(".", 1)[0] for key in weights.plan.replaced})
        raise UserError(
            f"{weights.adapter} holds {', '.join(names)} trained whole, which {form} has no place for; merge it instead"
        )


def _refuse(layer: AdaptedMatrix) -> None:
    if layer.axis != "output":
        raise UserError(
            f"{layer.name} has its magnitude on the input axis: it scales inputs, and no factor per output says that; "
            "merge it, or export it to lora"
        )
    if layer.kind.name == "Embedding":
        raise UserError(f"{layer.name} is an embedding: its rows are looked up, there is no product to scale; merge it instead")


def _tensors(layer: AdaptedMatrix) -> dict[str, Tensor]:
    low_rank = {} if layer.A is None else {"lora_A": layer.A, "lora_B": layer.B}
    return low_rank | {"output_scale": layer.g}
