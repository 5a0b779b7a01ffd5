"""One layer's tensors in an adapter file, by direction and layer kind, both ways. Keys and shapes are PEFT's where PEFT has them.

    Linear       lora_A.weight (R, I), lora_B.weight (O, R), lora_magnitude_vector (O,)
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

from ..bases import accumulation_dtype

PREFIX = "base_model.model."
SHARED = ("vera_A", "vera_B")

_IN_FILE = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
    "vera_b": "vera_lambda_b",
    "vera_d": "vera_lambda_d",
    "embedding_A": "lora_embedding_A",
    "embedding_B": "lora_embedding_B",
}
_OTHERS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "lokr_w1", "lokr_w2_a", "lokr_w2_b")
_SPELLED = {spelled.removesuffix(".weight"): name for name, spelled in _IN_FILE.items()} | {name: name for name in _OTHERS}
_KEY = re.compile(rf"^(.*)\.({'|'.join(_SPELLED)})(?:\.default)?(?:\.weight)?$")

Key = tuple[str, str]
"""(module, parameter); ("", key) for tensors of no adapted module."""


def file_key(key: Key) -> str:
    name, parameter = key
    if not name:
        return f"base_model.{parameter}" if parameter in SHARED else PREFIX + parameter
    return f"{PREFIX}{name}.{_IN_FILE.get(parameter, parameter)}"


def parse_key(key: str) -> Key:
    """A key in the file → (module, parameter). Both spellings of the magnitude are read: `lora_magnitude_vector` and
    `lora_magnitude_vector.weight`."""
    if (shared := key.removeprefix("base_model.").removesuffix(".default")) in SHARED:
        return "", shared
    key = key.removeprefix(PREFIX)
    if match := _KEY.match(key):
        return match[1], _SPELLED[match[2]]
    return "", key.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")


def expected(kind, base, module: nn.Module, direction, rank: int, magnitude: bool, axis: str) -> dict[str, tuple[int, ...]]:
    """Parameter → shape in the file, flattened to matrices and vectors (see `fitted`); rank 0: magnitude only."""
    *stack, rows, columns = base.shape(module)
    if direction.name in ("lora", "lora_offset", "none"):
        width = 2 * rank if direction.name == "lora_offset" else rank or 1
        shapes = {"lora_A": (width, columns), "lora_B": (rows, width)}
        if kind.name == "Embedding":
            shapes = {"embedding_A": (width, rows), "embedding_B": (columns, width)}
    else:
        shapes = direction.shapes((rows, columns), rank)
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
    """One layer's tensors as PEFT computes with them; `layer` is the module, or what is stored of it while it is merged.

    Magnitude only is rank 1 with B = 0."""
    a, s, kind = layer.adaptation, layer.scaling, layer.adaptation.kind
    get = {name: getattr(layer, name).detach().clone() for name in a.direction.names if getattr(layer, name) is not None}
    if a.direction.name == "lora_offset":
        A, B, A0, B0 = (get[name] for name in a.direction.names)
        get = {"lora_A": torch.cat([A - A0, A0], -2), "lora_B": torch.cat([B, B - B0], -1)}
    elif a.direction.name == "none":
        *stack, rows, columns = a.base.shape(module)
        device, s = a.base.device(module), scaling_of_rank_one
        get = {"lora_A": torch.zeros(*stack, 1, columns, device=device), "lora_B": torch.zeros(*stack, rows, 1, device=device)}
        get["lora_A"][..., 0, 0] = 1.0
    m = layer.magnitude
    if m is not None:
        get["magnitude"] = m.detach().clone()
        peft_has_it = (a.axis == "input") == (kind.name == "Embedding") and "lora_A" in get and get["lora_A"].dim() == 2
        if peft_has_it and len(frozen := frozen_rows(layer, module)):
            (_rows_without_direction if a.axis == "output" else _columns_without_direction)(layer, module, frozen, get, s)
    return _shaped(kind, module, get)


def _rows_without_direction(layer, module: nn.Module, frozen: Tensor, get: dict[str, Tensor], s: float) -> None:
    """m = |W + s·B·A| on rows without direction, where PEFT has no g = 1 of its own. A row that is 0 altogether would be 0/0 in
    PEFT: its B gets 1e-12."""
    base = layer.adaptation.base
    W = torch.cat([tile for _, tile in base.row_tiles(module, frozen)]) if layer is module else 0.0
    A, B = get["lora_A"], get["lora_B"]
    nothing = torch.linalg.vector_norm(W + s * B[frozen] @ A, dim=1) < 1e-12
    B[frozen[nothing], 0] += 1e-12 / (abs(s) * torch.linalg.vector_norm(A[0]))
    get["magnitude"][frozen] = torch.linalg.vector_norm(W + s * B[frozen] @ A, dim=1)


def _columns_without_direction(layer, module: nn.Module, frozen: Tensor, get: dict[str, Tensor], s: float) -> None:
    """The same for an embedding's dimensions."""
    A, B = get["lora_A"], get["lora_B"]
    if not B.any():
        B[0, 0] = 1e-12 / abs(s)
    total = torch.zeros(len(frozen), dtype=torch.float64, device=A.device)
    for rows, tile in layer.adaptation.base.row_tiles(module):
        total += (tile[:, frozen] * (layer is module) + s * B[rows] @ A[:, frozen]).double().square().sum(0)
    get["magnitude"][frozen] = total.sqrt().to(A.dtype)


def frozen_rows(layer, module: nn.Module) -> Tensor:
    """Indices of rows without direction; a merged layer remembers them."""
    if layer is module:
        return layer.adaptation.frozen_facts(module).directionless.nonzero().squeeze(1)
    return layer.frozen.nonzero().squeeze(1)


def _shaped(kind, module: nn.Module, get: dict[str, Tensor]) -> dict[str, Tensor]:
    """In the shapes of the file."""
    if kind.name == "Embedding" and "lora_A" in get:
        A, B = get.pop("lora_A"), get.pop("lora_B")
        return {"embedding_A": B.T.contiguous(), "embedding_B": A.T.contiguous()} | get
    if kind.name == "Conv" and "lora_A" in get:
        kernel, ones = module.weight.shape[1:], [1] * (module.weight.dim() - 2)
        get |= {"lora_A": get["lora_A"].view(-1, *kernel), "lora_B": get["lora_B"].view(*get["lora_B"].shape, *ones)}
        if "magnitude" in get:
            get["magnitude"] = get["magnitude"].view(1, -1, *ones)
    return get


def of_file(kind, direction, tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Fitted tensors of one layer → its own parameters' values (without m)."""
    own = {name: t for name, t in tensors.items() if name != "magnitude"}
    if "embedding_A" in own:
        own = {"lora_A": own["embedding_B"].T, "lora_B": own["embedding_A"].T}
    if direction.name == "none":
        return {}
    if direction.name == "lora_offset":
        wide = accumulation_dtype(own["lora_A"].dtype)
        A, B = own["lora_A"].to(wide), own["lora_B"].to(wide)
        A0, B_now = A[..., rank:, :], B[..., :rank]
        return {"lora_A": A[..., :rank, :] + A0, "lora_B": B_now, "start_A": A0, "start_B": B_now - B[..., rank:]}
    return own
