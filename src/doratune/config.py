"""AdapterConfig: everything that decides what is adapted and how. Names follow the paper and PEFT.

Frozen, keyword-only, checked on construction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .directions import METHODS, direction_of
from .errors import UserError, near_misses
from .support.fields import documented
from .support.values import check_choice, check_value, check_values, number

PEFT_NAMES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "target_parameters": "targets (a module of experts by its name)",
    "exclude_modules": "exclude",
    "modules_to_save": "also_train",
    "layers_to_transform": "layers",
    "rank_pattern": "rank_overrides",
    "alpha_pattern": "alpha_overrides",
    "use_dora": "method (dora or lora)",
    "use_rslora": "rank_scaling (rslora)",
    "init_lora_weights": "start",
    "trainable_token_indices": "also_train or targets of the embedding (all its rows)",
}
"""What PEFT calls settings that are here."""


@documented
@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Settings of one adapter.

    Raises:
        UserError: a value outside its range, or a module named by both `targets` and `magnitude_only` (found at attach).
    """

    method: str = "dora"
    """`dora`: low-rank direction and trained magnitude (Eq. 5). `lora`: the low-rank update alone (Eq. 1). `vera`, `loha`, `lokr`:
    other directions; `dvora` (§5.4), `dloha`, `dlokr`: the same with a magnitude. Or what `doratune.directions.register` added."""
    rank: int = number(16, least=1)
    """R, rows of A and columns of B."""
    alpha: float | None = number(None, above=0)
    """Scaling is alpha / rank (alpha / sqrt(rank) under rslora). None: 2 · rank, the paper's choice. Global: a module
    with its own rank keeps this alpha, as in PEFT. VeRA has no scaling."""
    rank_scaling: Literal["standard", "rslora"] = "standard"
    """`standard` alpha / R, `rslora` alpha / sqrt(R)."""
    dropout: float = number(0.0, least=0, below=1)
    """Dropout probability on the input of the low-rank branch, in training only."""
    targets: str | list[str] | tuple[str, ...] = "all-linear"
    """A list of module names or name suffixes; or a string: a regex that must match a whole module name, or
    `"all-linear"` (every linear layer but the output head and layers whose forward PyTorch bypasses), or `"all-layers"`."""
    exclude: str | list[str] | tuple[str, ...] = ()
    """Modules to leave out: a list of names or suffixes, or a regex."""
    layers: list[int] | tuple[int, ...] = number((), least=0)
    """Only modules in these layers, by the first index in their names (PEFT's `layers_to_transform`); (): in all."""
    magnitude_only: str | list[str] | tuple[str, ...] = ()
    """Further modules that train their magnitude alone (§5.6): no A, no B. Same forms as `targets`."""
    also_train: list[str] | tuple[str, ...] = ()
    """Modules trained whole (PEFT's `modules_to_save`), by name or suffix."""
    newly_initialized: Literal["train", "freeze"] = "train"
    """Parameters that no file holds, because transformers drew them at random (a new head) or a vocabulary was resized. `train`:
    their modules are trained whole and saved, as those of `also_train`; `freeze`: they stay, and `verify` names them."""
    rank_overrides: Mapping[str, int] = number({}, least=1)
    """Rank for single modules, by name or suffix; the first entry that fits counts."""
    alpha_overrides: Mapping[str, float] = number({}, above=0)
    """Alpha for single modules, likewise."""
    magnitude_axis: Literal["output", "input"] = "output"
    """One magnitude per output row (the authors' code, PEFT, torchtune), or per input column."""
    embedding_magnitude: Literal["token", "dimension"] = "token"
    """Of an embedding: one magnitude per `token` (row), or per `dimension` (PEFT's kind)."""
    norm_gradient: Literal["detached", "full"] = "detached"
    """`detached` treats the norm as a constant in the backward pass (§4.3, Eq. 11), `full` differentiates it (Eq. 6)."""
    start: Literal["zero", "pissa", "olora", "loftq"] = "zero"
    """Where A and B of a LoRA direction start (`directions/starts.py`): `zero` is B = 0. The output of step 0 is the base's; with
    `loftq`, which needs `original` weights at attach, it is nearer to theirs."""
    magnitude_from: Literal["base", "original"] = "base"
    """On a quantized base: m starts at the norm of the dequantized weight (`base`: the output of step 0 is the base's) or of the
    unquantized weight (`original`, given at attach; `verify` prints the offset)."""
    magnitude_form: Literal["direct", "relative"] = "direct"
    """`direct` trains m; `relative` trains δ in m = m₀·exp(δ), so that weight decay on it pulls m towards m₀."""
    norm_memory: int = number(0, least=0, most=2**63 - 1, of="bytes")
    """Bytes that VeRA may keep over all layers to spare the norm its product with W (O·R + R² numbers a layer); 0: none."""
    keep_base_output: bool | None = None
    """Keep the base's output for m's gradient, not the layer's own (which costs no memory where a later operation keeps it): for
    models whose kernels write over a layer's output unseen by autograd. None: found at attach (Liger, Unsloth)."""
    direction_settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Settings that the method's direction declares, by name; what is not given has the declared default (`setting`)."""
    seed: int = number(0, least=0, most=2**31 - 1)
    """Seed of A. Each module draws from its own generator, so that order and global state do not change the start."""

    def __post_init__(self) -> None:
        for name in ("targets", "exclude", "magnitude_only", "also_train"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        object.__setattr__(self, "layers", _indices(self.layers))
        if isinstance(self.also_train, str):
            object.__setattr__(self, "also_train", (self.also_train,))
        check_choice("method", self.method, METHODS)
        check_values(self)
        for name in ("rank_overrides", "alpha_overrides"):
            object.__setattr__(self, name, dict(getattr(self, name)))
        if self.alpha is None:
            object.__setattr__(self, "alpha", 2 * self.rank)
        self._check_together()

    def _check_together(self) -> None:
        """Settings that exclude each other."""
        if not self.has_magnitude:
            same = (name for name, (direction, m) in METHODS.items() if m and direction == self.direction)
            with_magnitude = next(same, "dora")
            for name, idle in (("magnitude_only", ()), ("magnitude_from", "base"), ("magnitude_form", "direct")):
                if getattr(self, name) != idle:
                    raise UserError(f"{name} needs a method with a magnitude; set method: {with_magnitude} or drop {name}")
        if self.start not in direction_of(self.method).starts:
            able = " or ".join(name for name in METHODS if self.start in direction_of(name).starts)
            raise UserError(f"start is {self.start!r}, which is for method {able}; drop it or change method {self.method!r}")
        if not direction_of(self.method).overrides and (self.rank_overrides or self.alpha_overrides):
            raise UserError(f"method {self.method} shares its factors, all of one rank; drop rank_overrides and alpha_overrides")
        known = direction_of(self.method).settings
        for name, value in self.direction_settings.items():
            if name not in known:
                raise UserError(f"direction_settings: method {self.method} has no setting {name!r}{near_misses(name, known)}")
            if isinstance(known[name], bool | int | float | str):
                check_value(f"direction_settings: {name}", value, type(known[name]))
        object.__setattr__(self, "direction_settings", dict(self.direction_settings))

    def setting(self, name: str) -> Any:
        """The value of one of the settings that the method's direction declares."""
        return {**direction_of(self.method).settings, **self.direction_settings}[name]

    @property
    def has_magnitude(self) -> bool:
        return METHODS[self.method][1]

    @property
    def direction(self) -> str:
        return METHODS[self.method][0]

    def scaling(self, rank: int, alpha: float | None = None) -> float:
        """s = alpha / rank, or alpha / sqrt(rank) under rslora; 1 for VeRA."""
        if not direction_of(self.method).scaled:
            return 1.0
        alpha = self.alpha if alpha is None else alpha
        return alpha / (rank**0.5 if self.rank_scaling == "rslora" else rank)

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterConfig:
        """Build from plain data; an unknown key is an error that names its near misses."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                here = f"; PEFT's {key} is {PEFT_NAMES[key]} here" if key in PEFT_NAMES else near_misses(key, known)
                raise UserError(f"unknown adapter setting {key!r}{here}")
        return cls(**values)


def _indices(value) -> tuple[int, ...]:
    values = () if value is None else (value,) if isinstance(value, int) else value
    if not isinstance(values, list | tuple | range | set) or not all(type(i) is int and i >= 0 for i in values):
        raise UserError(f"layers is {value!r}; expected indices of layers, such as [0, 1, 2]")
    return tuple(sorted(set(values)))


def _patterns(name: str, value) -> str | tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple | set | frozenset) or not all(isinstance(v, str) and v for v in value):
        raise UserError(f"{name} is {value!r}; expected a string or a list of module names")
    return tuple(sorted(value) if isinstance(value, set | frozenset) else value)
