"""One layer's tensors in an adapter file, by direction and layer kind, both ways. Keys and shapes are PEFT's where PEFT has them.

    Linear       lora_A.weight (R, I), lora_B.weight (O, R), lora_magnitude_vector.weight (O,)
    Conv         the same as filters: (R, I, k…), (O, R, 1…), (1, O, 1…)
    Embedding    lora_embedding_A (R, tokens) = Bᵀ, lora_embedding_B (dimensions, R) = Aᵀ
    VeRA         vera_lambda_b (O,), vera_lambda_d (R,), and once vera_A, vera_B
    an offset start (PiSSA, OLoRA)   a LoRA of rank 2R: [A − A₀; A₀], [B, B − B₀]

Every other direction has its parameters under their own names. Experts have each of these once more for each expert, in front.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from ..directions import Direction, all_shared, file_names
from ..errors import UserError
from ..layers.shares import at_hand, gathered

PREFIX = "base_model.model."

_OF_KINDS = {
    "magnitude": "lora_magnitude_vector.weight",  # PEFT's files have no .weight, and all but transformers' loader read both
    "embedding_A": "lora_embedding_A",
    "embedding_B": "lora_embedding_B",
}
"""Names in a file besides those that directions declare."""


def _spellings(direction: Direction) -> dict[str, str]:
    """Parameter → its name in a file."""
    return file_names(direction) | _OF_KINDS


_SPECK = 1e-20
"""Of a factor that is 0 altogether."""

Key = tuple[str, str]
"""(module, parameter); ("", key) for tensors of no adapted module."""


def file_key(key: Key, direction: Direction) -> str:
    name, parameter = key
    if not name:
        return f"base_model.{parameter}" if parameter in all_shared() else PREFIX + parameter
    return f"{PREFIX}{name}.{_spellings(direction).get(parameter, parameter)}"


def shown(key: Key) -> str:
    """For a message, on one line."""
    name = ".".join(part for part in key if part)
    return name if name.isprintable() else repr(name)


def parse_keys(tensors: dict[str, Tensor], direction: Direction, where: str) -> dict[Key, Tensor]:
    """A file's tensors by (module, parameter).

    Raises:
        UserError: two of its keys mean one tensor.
    """
    parsed: dict[Key, tuple[str, Tensor]] = {}
    for spelled, t in tensors.items():
        key = parse_key(spelled, direction)
        if key in parsed:
            raise UserError(f"{where} holds {shown(key)} twice, as {parsed[key][0]!r} and {spelled!r}; save the adapter again")
        parsed[key] = spelled, t
    return {key: t for key, (_, t) in parsed.items()}


def parse_key(key: str, direction: Direction) -> Key:
    """A key in the file → (module, parameter). Both spellings of the magnitude are read: `lora_magnitude_vector` and
    `lora_magnitude_vector.weight`."""
    if (shared := key.removeprefix("base_model.").removesuffix(".default")) in all_shared():
        return "", shared
    key = key.removeprefix(PREFIX)
    names = {spelled.removesuffix(".weight"): name for name, spelled in _spellings(direction).items()}
    if match := re.fullmatch(rf"(.*)\.({'|'.join(map(re.escape, names))})(?:\.default)?(?:\.weight)?", key):
        return match[1], names[match[2]]
    return "", key.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")


def expected(kind, base, module: nn.Module, direction: Direction, rank: int, magnitude: bool, axis: str):
    """Parameter → shape in the file, flattened to matrices and vectors (see `fitted`); rank 0: magnitude only."""
    *stack, rows, columns = base.shape(module)
    shapes = kind.file_shapes(direction.file_shapes((rows, columns), rank))
    shapes |= {"magnitude": (rows if axis == "output" else columns,)} if magnitude else {}
    return {name: (*stack, *shape) for name, shape in shapes.items()}


def fitted(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A file's tensor in the shape of the maths: filters flattened, a magnitude saved as (O, 1) or (1, O, 1, 1) as a vector."""
    if t.dim() > len(shape) and t.numel() == torch.Size(shape).numel():
        squeezed = tuple(size for size in t.shape if size != 1)
        same_rows = t.shape[0] == shape[0] and len(shape) == 2
        if same_rows or squeezed == tuple(size for size in shape if size != 1):
            return t.reshape(shape)
    return t


@torch.no_grad()
def to_file(layer, module: nn.Module, scaling_of_rank_one: float) -> dict[str, Tensor]:
    """One layer's tensors as PEFT computes with them; `layer` is the module, or what is stored of it while it is merged."""
    weight, kind = layer.adapted, layer.adapted.kind
    own = {name: gathered(getattr(layer, name)).detach().clone() for name in weight.direction.names}
    shape, device = weight.base.shape(module), weight.base.device(module)
    get = dict(weight.direction.to_file(own, shape, device))
    m = layer.magnitude
    if m is not None:
        get["magnitude"] = gathered(m).detach().clone()
        in_peft = weight.axis == kind.peft_axis and "lora_A" in get and get["lora_A"].dim() == 2
        if in_peft and len(frozen := frozen_rows(layer, module)):
            s = layer.scaling if weight.rank else scaling_of_rank_one
            with at_hand(module):
                (_rows_without_direction if weight.axis == "output" else _columns_without_direction)(layer, module, frozen, get, s)
    return kind.file_tensors(module, get)


def _rows_without_direction(layer, module: nn.Module, frozen: Tensor, get: dict[str, Tensor], s: float) -> None:
    """m = |W + s·B·A| on rows without direction, where PEFT has no g = 1 of its own. A row that is 0 altogether would be 0/0 in
    PEFT: its ΔV gets the length 1e-12."""
    base = layer.adapted.base
    W = torch.cat([tile for _, tile in base.row_tiles(module, frozen)]) if layer is module else 0.0
    A, B = get["lora_A"], get["lora_B"]
    nothing = torch.linalg.vector_norm(W + s * B[frozen] @ A, dim=1) < 1e-12
    if nothing.any():
        lengths = torch.linalg.vector_norm(A, dim=1)
        used = int(lengths.argmax())
        if not lengths[used]:  # all of A is 0: a number so small that B times it is nothing on the other rows
            A[used, 0] = lengths[used] = _SPECK
        B[frozen[nothing], used] += 1e-12 / (abs(s) * lengths[used])
    get["magnitude"][frozen] = torch.linalg.vector_norm(W + s * B[frozen] @ A, dim=1)


def _columns_without_direction(layer, module: nn.Module, frozen: Tensor, get: dict[str, Tensor], s: float) -> None:
    """The same for an embedding's dimensions."""
    A, B = get["lora_A"], get["lora_B"]

    def lengths_now() -> Tensor:
        total = torch.zeros(len(frozen), dtype=torch.float64, device=A.device)
        for rows, tile in layer.adapted.base.row_tiles(module):
            total += (tile[:, frozen] * (layer is module) + s * B[rows] @ A[:, frozen]).double().square().sum(0)
        return total.sqrt()

    nothing = lengths_now() < 1e-12
    if nothing.any():
        lengths = torch.linalg.vector_norm(B, dim=0)
        used = int(lengths.argmax())
        if not lengths[used]:
            B[0, used] = lengths[used] = _SPECK
        A[used, frozen[nothing]] += 1e-12 / (abs(s) * lengths[used])
    get["magnitude"][frozen] = lengths_now().to(A.dtype)


def gain_into_factors(module: nn.Module, m: Tensor) -> None:
    """On rows without direction, which have g = 1 here, put the gain m / |W + s·B·A| of another program's file into B (on the input
    axis into A): W is nothing there. What `to_file` wrote has none."""
    weight, rows, s = module.adapted, frozen_rows(module, module), module.scaling
    A, B = module.lora_A, module.lora_B
    if weight.axis == "output":
        W = torch.cat([tile for _, tile in weight.base.row_tiles(module, rows)])
        n = torch.linalg.vector_norm(W + s * B[rows] @ A, dim=1)
    else:
        total = sum((t[:, rows] + s * B[i] @ A[:, rows]).double().square().sum(0) for i, t in weight.base.row_tiles(module))
        n = total.sqrt().to(A.dtype)
    gain = m.to(n)[rows] / n
    gain = torch.where((n > 0) & ((gain - 1).abs() > _SAME), gain, 1.0)
    if weight.axis == "output":
        B[rows] *= gain[:, None]
    else:
        A[:, rows] *= gain


_SAME = 1e-3
"""A gain as near to 1 as this is rounding."""


def frozen_rows(layer, module: nn.Module) -> Tensor:
    """Indices of rows without direction; a merged layer remembers them."""
    if layer is module:
        return layer.adapted.facts.directionless.nonzero().squeeze(1)
    return layer.frozen.nonzero().squeeze(1)


def of_file(kind, direction: Direction, tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Fitted tensors of one layer → its own parameters' values (without m)."""
    own = {name: t for name, t in tensors.items() if name != "magnitude"}
    return direction.of_file(kind.from_file(own), rank)
