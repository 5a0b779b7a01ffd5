"""Plain LoRA instead of DoRA, nearly: the best low-rank part of ΔW = W' − W, for engines that know LoRA only.

    ΔW = U·Σ·Vᵀ,   B = U_K·√Σ_K,   A = √Σ_K·V_Kᵀ,   residual = √(Σ_{i>K} σ_i²) / |ΔW|      (Eckart, Young 1936)

ΔW = diag(g − 1)·W + diag(g)·s·B·A has full rank: never exact below it. Each layer has the rank asked for, or the smallest whose
residual is at most the error asked for. What is said of a layer is measured on the numbers in the file (fp32).

Cost: for each layer one full SVD of an (O, I) matrix in fp32, some 10·O·I·min(O, I) FLOPs, and the memory of one layer. (A random
SVD is faster, but gives no smallest rank for an error, and at a flat spectrum as here a worse residual: not taken.)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import __version__
from ..checkpoint import peft
from ..checkpoint.base_check import header, recorded
from ..config import AdapterConfig
from ..errors import UserError
from ..support.files import write_json, write_tensors
from ..support.folders import new_folder, refuse_existing
from ..support.tables import aligned
from .layers import AdaptedMatrix, adapted_layers
from .output_scale import refuse_whole
from .weights import Weights


@dataclass(frozen=True)
class Residual:
    """One layer: the rank it got, |ΔW| and |ΔW − B·A| (Frobenius)."""

    rank: int
    norm: float
    missing: float

    @property
    def relative(self) -> float:
        return self.missing / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class TruncatedExport:
    """What was written, layer by layer."""

    folder: Path
    layers: dict[str, Residual]

    @property
    def relative(self) -> float:
        """The residual of all layers together."""
        norm = sum(r.norm**2 for r in self.layers.values())
        return (sum(r.missing**2 for r in self.layers.values()) / norm) ** 0.5 if norm else 0.0

    def table(self) -> str:
        rows = [[name, str(r.rank), f"{r.norm:.4g}", f"{r.relative:.4f}"] for name, r in self.layers.items()]
        norm = sum(r.norm**2 for r in self.layers.values()) ** 0.5
        rows.append(["all", "", f"{norm:.4g}", f"{self.relative:.4f}"])
        return "\n".join(aligned(["layer", "rank", "norm of the update", "residual"], rows))

    def to_dict(self) -> dict:
        layers = {name: {"rank": r.rank, "norm": r.norm, "residual": r.relative} for name, r in self.layers.items()}
        return {"residual": self.relative, "layers": layers}


def export_truncated(
    base: str,
    adapter: str | Path,
    output: str | Path,
    rank: int | None = None,
    error: float | None = None,
    overwrite: bool = False,
    check_base: bool = True,
) -> TruncatedExport:
    """Write a plain LoRA folder (PEFT's layout, use_dora false).

    Args:
        rank: of every layer, at most min(O, I); or error: the largest relative residual of a layer; check_base: as `doratune.load`.

    Raises:
        UserError: neither or both of rank and error, or out of range; an adapter that does not fit; modules trained whole.
    """
    _check(rank, error)
    refuse_existing(Path(output), overwrite)
    weights, tensors, residuals, transposed = Weights(base, adapter, check_base), {}, {}, []
    refuse_whole(weights, "plain LoRA")
    for layer in adapted_layers(weights):
        A, B, residuals[layer.name] = truncated(layer, rank, error)
        tensors |= _file_tensors(layer, A, B)
        transposed.append(layer.kind.transposed)
    ranks = {name: residual.rank for name, residual in residuals.items()}
    with new_folder(Path(output), overwrite) as folder:
        write_lora(folder, base, tensors, ranks, all(transposed), header(recorded(adapter)))
        write_json(folder / "residuals.json", TruncatedExport(Path(output), residuals).to_dict())
    return TruncatedExport(Path(output), residuals)


def _check(rank: int | None, error: float | None) -> None:
    if (rank is None) == (error is None):
        raise UserError("give one of --rank R (the same for every layer) and --error 0.05 (the smallest rank that is good enough)")
    if rank is not None and rank < 1:
        raise UserError(f"rank is {rank}; expected at least 1")
    if error is not None and not 0 < error < 1:
        raise UserError(f"error is {error}; expected a number between 0 and 1, e.g. 0.05")


@torch.no_grad()
def truncated(layer: AdaptedMatrix, rank: int | None, error: float | None) -> tuple[Tensor, Tensor, Residual]:
    """(A (K, I), B (O, K), what is missing); at least one component, so that PEFT has a layer there."""
    delta = layer.merged - layer.W
    U, S, Vh = svd(delta)
    K = min(rank or smallest_rank(S, error), len(S))
    root = S[:K].sqrt()
    A, B = root[:, None] * Vh[:K], U[:, :K] * root
    return A, B, Residual(K, delta.double().norm().item(), (delta - B @ A).double().norm().item())


def smallest_rank(S: Tensor, error: float) -> int:
    """The fewest singular values without which at most `error` of the norm is missing; at least 1."""
    energy = S.double().square()
    missing = (energy.flip(0).cumsum(0).flip(0) / energy.sum().clamp_min(1e-300)).sqrt()  # without components i, i + 1, …
    return max(1, int((missing > error).sum()))


def svd(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (O, N), S (N,), Vᵀ (N, I) in fp32."""
    return torch.linalg.svd(M.float(), full_matrices=False)


def _file_tensors(layer: AdaptedMatrix, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """The layer's tensors under PEFT's names."""
    if layer.kind.name not in ("Linear", "Conv1D"):
        raise UserError(f"{layer.name} is of the kind {layer.kind.name}; plain LoRA is written for linear layers: merge it instead")
    return {f"base_model.model.{layer.name}.lora_A.weight": A, f"base_model.model.{layer.name}.lora_B.weight": B}


def write_lora(
    folder: Path,
    base: str,
    tensors: dict[str, Tensor],
    ranks: dict[str, int],
    transposed: bool = False,
    metadata: dict[str, str] | None = None,
) -> None:
    """A LoRA folder in PEFT's layout whose scaling is 1 in every layer.

    Args:
        transposed: weights are stored (I, O); metadata: of the file of tensors.
    """
    most = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != most}
    config = AdapterConfig(
        method="lora",
        rank=most,
        alpha=most,
        targets=tuple(ranks),
        rank_overrides=others,
        alpha_overrides={name: float(rank) for name, rank in others.items()},
    )
    described = peft.describe(config, ranks, {name: float(rank) for name, rank in ranks.items()}, base, transposed)
    write_tensors(folder / "adapter_model.safetensors", tensors, metadata)
    write_json(folder / "adapter_config.json", described | {"task_type": "CAUSAL_LM"})
    write_json(folder / "doratune.json", {"doratune_version": __version__, "adapter": config.to_dict()})
