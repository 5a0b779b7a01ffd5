"""AdapterConfig: everything that decides what is adapted and how. Names follow the paper and PEFT.

Frozen, keyword-only, checked on construction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .directions import METHODS, direction_of
from .errors import UserError, near_misses

STARTS = ("zero", "pissa", "olora", "loftq")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Settings of one adapter.

    Raises:
        UserError: a value outside its range, or a module named by both `targets` and `magnitude_only` (found at attach).
    """

    method: str = "dora"
    """`dora`: low-rank direction and trained magnitude (Eq. 5). `lora`: the low-rank update alone (Eq. 1). `vera`, `loha`, `lokr`:
    other directions; `dvora` (§5.4), `dloha`, `dlokr`: the same with a magnitude. Or what `doratune.directions.register` added."""
    rank: int = 16
    """R, rows of A and columns of B."""
    alpha: float | None = None
    """Scaling is alpha / rank (alpha / sqrt(rank) under rslora). None: 2 · rank, the paper's choice. Global: a module
    with its own rank keeps this alpha, as in PEFT. VeRA has no scaling."""
    rank_scaling: Literal["standard", "rslora"] = "standard"
    """`standard` alpha / R, `rslora` alpha / sqrt(R)."""
    dropout: float = 0.0
    """Dropout probability on the input of the low-rank branch, in training only."""
    targets: str | tuple[str, ...] = "all-linear"
    """A list of module names or name suffixes; or a string: a regex that must match a whole module name, or
    `"all-linear"` (every linear layer but the output head and layers whose forward PyTorch bypasses), or `"all-layers"`."""
    exclude: str | tuple[str, ...] = ()
    """Modules to leave out: a list of names or suffixes, or a regex."""
    magnitude_only: str | tuple[str, ...] = ()
    """Further modules that train their magnitude alone (§5.6): no A, no B. Same forms as `targets`."""
    also_train: tuple[str, ...] = ()
    """Modules trained whole (PEFT's `modules_to_save`), by name or suffix."""
    newly_initialized: Literal["train", "freeze"] = "train"
    """Parameters that no file holds, because transformers drew them at random (a new head) or a vocabulary was resized. `train`:
    their modules are trained whole and saved, as those of `also_train`; `freeze`: they stay, and `verify` names them."""
    rank_overrides: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Rank for single modules, by name or suffix; the first entry that fits counts."""
    alpha_overrides: Mapping[str, float] = dataclasses.field(default_factory=dict)
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
    norm_memory: int = 0
    """Bytes that VeRA may keep over all layers to spare the norm its product with W (O·R + R² numbers a layer); 0: none."""
    keep_base_output: bool | None = None
    """Keep the base's output for m's gradient, not the layer's own (which costs no memory where a later operation keeps it): for
    models whose kernels write over a layer's output unseen by autograd. None: found at attach (Liger, Unsloth)."""
    direction_settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Settings that the method's direction declares, by name; what is not given has the declared default (`setting`)."""
    seed: int = 0
    """Seed of A. Each module draws from its own generator, so that order and global state do not change the start."""

    def __post_init__(self):
        for name in ("targets", "exclude", "magnitude_only", "also_train"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        if isinstance(self.also_train, str):
            object.__setattr__(self, "also_train", (self.also_train,))
        for name, kind in (("rank_overrides", int), ("alpha_overrides", (int, float))):
            value = getattr(self, name)
            if not isinstance(value, Mapping) or not all(_is_number(v, kind) and 0 < v < float("inf") for v in value.values()):
                raise UserError(f"{name} is {value!r}; expected a mapping from module names to positive numbers")
            object.__setattr__(self, name, dict(value))
        check_choice("method", self.method, METHODS)
        check_choice("rank_scaling", self.rank_scaling, ("standard", "rslora"))
        check_choice("magnitude_axis", self.magnitude_axis, ("output", "input"))
        check_choice("norm_gradient", self.norm_gradient, ("detached", "full"))
        check_choice("newly_initialized", self.newly_initialized, ("train", "freeze"))
        check_choice("embedding_magnitude", self.embedding_magnitude, ("token", "dimension"))
        check_choice("start", self.start, STARTS)
        check_choice("magnitude_from", self.magnitude_from, ("base", "original"))
        check_choice("magnitude_form", self.magnitude_form, ("direct", "relative"))
        if not _is_number(self.rank, int) or self.rank <= 0:
            raise UserError(f"rank is {self.rank!r}; expected a whole number of at least 1")
        if self.alpha is None:
            object.__setattr__(self, "alpha", 2 * self.rank)
        if not _is_number(self.alpha) or not 0 < self.alpha < float("inf"):
            raise UserError(f"alpha is {self.alpha!r}; expected a positive number (2 * rank is usual)")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout!r}; expected a number from 0 up to, not including, 1")
        if not _is_number(self.seed, int) or not 0 <= self.seed < 2**31:
            raise UserError(f"seed is {self.seed!r}; expected a whole number from 0 to 2**31 - 1")
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
        if not isinstance(self.direction_settings, Mapping):
            raise UserError(f"direction_settings is {self.direction_settings!r}; expected a mapping")
        for name in self.direction_settings:
            if name not in known:
                raise UserError(f"direction_settings: method {self.method} has no setting {name!r}{near_misses(name, known)}")
        object.__setattr__(self, "direction_settings", dict(self.direction_settings))
        if self.keep_base_output not in (None, True, False):
            raise UserError(f"keep_base_output is {self.keep_base_output!r}; expected true, false, or nothing")
        if not _is_number(self.norm_memory, int) or self.norm_memory < 0:
            raise UserError(f"norm_memory is {self.norm_memory!r}; expected a number of bytes, 0 for none")

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
                raise UserError(f"unknown adapter setting {key!r}{near_misses(key, known)}")
        return cls(**values)


def _patterns(name: str, value) -> str | tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple | set | frozenset) or not all(isinstance(v, str) and v for v in value):
        raise UserError(f"{name} is {value!r}; expected a string or a list of module names")
    return tuple(sorted(value) if isinstance(value, set | frozenset) else value)


def check_choice(name: str, value, allowed: Iterable[str]) -> None:
    """Raise where the value is none of those allowed, and name its near misses."""
    if not isinstance(value, str) or value not in allowed:
        raise UserError(f"{name} is {value!r}; expected one of {', '.join(allowed)}{near_misses(value, allowed)}")


def _is_number(value, kind=(int, float)) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
