"""BaselineConfig: which baseline, how large, where. The defaults are LLM-Adapters' (its finetune.py and tables).

Frozen, keyword-only, checked on construction; nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import UserError, near_misses

METHODS = {"series": (256, ("down_proj",)), "parallel": (256, ("up_proj", "down_proj")), "prefix": (30, ())}
"""Method → (size, targets) where none are given."""

ACTIVATIONS = ("tanh", "relu", "gelu", "silu")


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """Settings of one baseline.

    Raises:
        UserError: a value outside its range, or a setting that the method does not have.
    """

    method: Literal["series", "parallel", "prefix"]
    """`series`: after a linear layer. `parallel`: beside it. `prefix`: keys and values in front of every attention's own."""
    size: int | None = None
    """Width of the bottleneck, or number of virtual tokens. None: 256, 256, 30."""
    targets: str | tuple[str, ...] | None = None
    """Linear layers, by name or suffix or as a regex, as in `AdapterConfig`. None: down_proj (series), up_proj and down_proj
    (parallel). Prefix tuning has none: it reaches every attention."""
    scaling: float = 1.0
    """s in front of a bottleneck's output."""
    activation: Literal["tanh", "relu", "gelu", "silu"] = "tanh"
    """Between down and up; tanh is LLM-Adapters' `non_linearity`."""
    seed: int = 0
    """Seed of the start. Each module draws from its own generator, so that order and global state do not change the start."""

    def __post_init__(self):
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise UserError(
                f"method is {self.method!r}; expected one of {', '.join(METHODS)}{near_misses(str(self.method), METHODS)}"
            )
        size, targets = METHODS[self.method]
        if self.method == "prefix":
            self._refuse_idle()
        object.__setattr__(self, "size", size if self.size is None else self.size)
        object.__setattr__(self, "targets", targets if self.targets is None or self.method == "prefix" else _names(self.targets))
        if not isinstance(self.size, int) or isinstance(self.size, bool) or self.size < 1:
            what = "virtual tokens" if self.method == "prefix" else "numbers in the bottleneck"
            raise UserError(f"size is {self.size!r}; expected a whole number of {what}, at least 1")
        number = isinstance(self.scaling, int | float) and not isinstance(self.scaling, bool)
        if not number or not 0 < self.scaling < float("inf"):
            raise UserError(f"scaling is {self.scaling!r}; expected a positive number")
        if not isinstance(self.activation, str) or self.activation not in ACTIVATIONS:
            hint = near_misses(str(self.activation), ACTIVATIONS)
            raise UserError(f"activation is {self.activation!r}; expected one of {', '.join(ACTIVATIONS)}{hint}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**31:
            raise UserError(f"seed is {self.seed!r}; expected a whole number from 0 to 2**31 - 1")

    def _refuse_idle(self) -> None:
        """Settings that prefix tuning does not have."""
        for name, idle in (("targets", (None, (), [])), ("scaling", (1.0,)), ("activation", ("tanh",))):
            if getattr(self, name) not in idle:
                raise UserError(f"{name} is {getattr(self, name)!r}, which method prefix does not have; drop {name}")

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BaselineConfig:
        """Build from plain data; an unknown key is an error that names its near misses."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise UserError(f"unknown baseline setting {key!r}{near_misses(key, known)}")
        if "method" not in values:
            raise UserError(f"method is missing; expected one of {', '.join(METHODS)}")
        return cls(**values)


def _names(value) -> str | tuple[str, ...]:
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list | tuple) or not value or not all(isinstance(v, str) and v for v in value):
        raise UserError(f"targets is {value!r}; expected a regex or a list of module names")
    return tuple(value)
