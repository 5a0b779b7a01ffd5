"""LoRA's direction from another start than B = 0.

    pissa    s·B₀·A₀ = the leading R singular triples of W (PiSSA)        A₀ = √S·Vᵀ, B₀ = U·√S (over √s each)
    olora    s·B₀·A₀ = Q·R of W's QR factorization, R columns of Q (OLoRA)
    loftq    s·B₀·A₀ = the leading triples of W − Q(W): what quantization lost (LoftQ, one iteration)

PiSSA and OLoRA train A and B from A₀, B₀ and take s·B₀·A₀ out of the frozen weight; here it is taken out of ΔV (`lora.py`). LoftQ
adds its start to the quantized weight; m then starts at the norm of W + ΔV (`adapter/start.py`), so that g = 1 in every case.

Cost: products of W with R + 10 vectors from row tiles, never a dense copy; while training, twice LoRA's low-rank work for the
first two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..errors import UserError

_OVERSAMPLE, _ITERATIONS = 10, 4

Tiles = Callable[[], Iterable[tuple[slice, Tensor]]]
"""Row tiles of the matrix, afresh at each call."""


@torch.no_grad()
def put_start(own: dict[str, Tensor], name: str, tiles: Tiles, s: float, seed: int) -> None:
    """Give A and B (and A₀, B₀ where the direction has them) the start `name`, from row tiles of their W.

    For loftq the tiles are of W − Q(W)."""
    A, B = own["lora_A"], own["lora_B"]
    make = orthogonal if name == "olora" else leading
    try:
        B0, A0 = make(tiles, len(B), A.shape[1], len(A), A.dtype, A.device, seed)
    except torch.linalg.LinAlgError:
        raise UserError(f"start {name!r}: the weight holds NaN or infinite values; repair it, or use start: zero") from None
    for parameter, value in (("lora_A", A0), ("lora_B", B0), ("start_A", A0), ("start_B", B0)):
        if (p := own.get(parameter)) is not None:
            p.copy_(value / abs(s) ** 0.5)


def leading(tiles: Tiles, rows: int, columns: int, rank: int, dtype, device, seed: int) -> tuple[Tensor, Tensor]:
    """(U·√S (O, R), √S·Vᵀ (R, I)): the leading singular triples, by subspace iteration (Halko et al., 2011)."""
    width = min(rank + _OVERSAMPLE, rows, columns)
    generator = torch.Generator().manual_seed(seed % 2**63)
    Q_IK = torch.randn(columns, width, generator=generator, dtype=dtype).to(device)
    for _ in range(_ITERATIONS + 1):
        Q_OK = torch.linalg.qr(times(tiles, Q_IK, rows))[0]
        Q_IK = torch.linalg.qr(times_transposed(tiles, Q_OK, columns))[0]
    U, S, Vh = torch.linalg.svd(times(tiles, Q_IK, rows), full_matrices=False)
    root = torch.zeros(rank, dtype=dtype, device=device)
    root[: len(S)] = S[:rank].sqrt()
    B, A = torch.zeros(rows, rank, dtype=dtype, device=device), torch.zeros(rank, columns, dtype=dtype, device=device)
    B[:, : len(S)], A[: len(S)] = U[:, :rank], (Vh @ Q_IK.T)[:rank]
    B, A = B * root, A * root[:, None]
    dead = root <= 1e-6 * root.max()  # A = B = 0 would never learn: such directions start as LoRA's do
    if dead.any():
        fresh = (torch.rand(A.shape, generator=generator, dtype=dtype) * 2 - 1).to(device) * columns**-0.5
        A, B = torch.where(dead[:, None], fresh, A), torch.where(dead, 0.0, B)
    return B, A


def orthogonal(tiles: Tiles, rows: int, columns: int, rank: int, dtype, device, seed: int) -> tuple[Tensor, Tensor]:
    """(Q (O, R), the first R rows of R (R, I)) of W = Q·R: Q's first columns come from W's first columns alone."""
    first = torch.cat([tile[:, :rank].to(dtype) for _, tile in tiles()])
    Q = torch.linalg.qr(first)[0]
    return Q, times_transposed(tiles, Q, columns).T


def times(tiles: Tiles, X_IK: Tensor, rows: int) -> Tensor:
    out = X_IK.new_zeros(rows, X_IK.shape[1])
    for which, tile in tiles():
        out[which] = tile.to(X_IK.dtype) @ X_IK
    return out


def times_transposed(tiles: Tiles, Y_OK: Tensor, columns: int) -> Tensor:
    out = Y_OK.new_zeros(columns, Y_OK.shape[1])
    for which, tile in tiles():
        out += tile.to(Y_OK.dtype).T @ Y_OK[which]
    return out
