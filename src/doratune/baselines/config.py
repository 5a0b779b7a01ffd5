"""BaselineConfig: which baseline, how large, where. The defaults are LLM-Adapters' (its finetune.py and tables).

Frozen, keyword-only, checked on construction; nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import UserError, near_misses
from ..support.values import Range, check_choice, check_value, check_values, number

METHODS = {"series": (256, ("down_proj",)), "parallel": (256, ("up_proj", "down_proj")), "prefix": (30, ())}
"""Method → (size, targets) where none are given."""


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """Settings of one baseline.

    Raises:
        UserError: a value outside its range, or a setting that the method does not have.
    """

    method: Literal["series", "parallel", "prefix"]
    """`series`: after a linear layer. `parallel`: beside it. `prefix`: keys and values in front of every attention's own."""
    size: int | None = number(None, least=1)
    """Width of the bottleneck, or number of virtual tokens. None: 256, 256, 30."""
    targets: str | tuple[str, ...] | None = None
    """Linear layers, by name or suffix or as a regex, as in `AdapterConfig`. None: down_proj (series), up_proj and down_proj
    (parallel). Prefix tuning has none: it reaches every attention."""
    scaling: float = number(1.0, above=0)
    """s in front of a bottleneck's output."""
    activation: Literal["tanh", "relu", "gelu", "silu"] = "tanh"
    """Between down and up; tanh is LLM-Adapters' `non_linearity`."""
    seed: int = number(0, least=0, most=2**31 - 1)
    """Seed of the start. Each module draws from its own generator, so that order and global state do not change the start."""

    def __post_init__(self):
        check_choice("method", self.method, METHODS)
        size, targets = METHODS[self.method]
        if self.method == "prefix":
            self._refuse_idle()
        object.__setattr__(self, "size", size if self.size is None else self.size)
        object.__setattr__(self, "targets", targets if self.targets is None or self.method == "prefix" else _names(self.targets))
        what = "virtual tokens" if self.method == "prefix" else "numbers in the bottleneck"
        check_value("size", self.size, int, Range(least=1, of=what))
        check_values(self)

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
