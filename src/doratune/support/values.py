"""What a setting may be, declared beside it and checked in one place, in the same words for every command and every dataclass.

    rank: int = number(16, least=1)
    lr: float = number(1e-4, above=0)
    max_steps: int = number(-1, least=1, also={-1: "for no limit"})
    arms: list[str] = choices(["lora"], ("frozen", "lora", "dora"))

`check_values(settings)` holds each value against its field's annotation (whole number, number, text, list, mapping, Literal, None)
and range; true and false are no numbers, and no number is NaN or infinite. A message says which setting, which value, what is
expected: "rank is 0; expected a whole number of at least 1". Cost: microseconds a field.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Union

from ..errors import UserError, near_misses

MOST = 2**31 - 1
"""The largest whole number of a setting that names no other: what torch, transformers and a C int hold."""

_KEY = "values"


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that a setting may be, and what a number counts."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    also: Mapping[int, str] = field(default_factory=dict)
    """Further values, with what they stand for."""
    of: str = ""
    """What is counted: `virtual tokens`."""

    def holds(self, value: float) -> bool:
        if value in self.also:
            return True
        low = (self.least is None or value >= self.least) and (self.above is None or value > self.above)
        return low and (self.most is None or value <= self.most) and (self.below is None or value < self.below)

    def words(self, kind: str) -> str:
        """`a whole number of at least 1, or -1 for no limit`."""
        kind, at_least = (f"{kind} of {self.of}", ", at least") if self.of else (kind, " of at least")
        if self.least is not None and self.most is not None:
            text = f"{kind} from {self.least} to {self.most}"
        elif self.least is not None and self.below is not None:
            text = f"{kind} from {self.least} up to, not including, {self.below}"
        elif self.above is not None and self.below is not None:
            text = f"{kind} between {self.above} and {self.below}"
        elif self.least is not None:
            text = f"{kind}, {self.least} or more" if self.least == 0 else f"{kind}{at_least} {self.least}"
        elif self.above == 0:
            text = kind.replace("a ", "a positive ", 1)
        else:
            text = kind
        return text + "".join(f", or {value} {meaning}" for value, meaning in self.also.items())


def number(default: Any, **limits) -> Any:
    """A dataclass field of a number, or of a list or a mapping of numbers, in a `Range`."""
    return _declared(default, Range(**limits))


def choices(default: Any, known: Iterable[str]) -> Any:
    """A dataclass field of a text, or of a list of texts, that is one of those known."""
    return _declared(default, tuple(known))


def _declared(default: Any, rule) -> Any:
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={_KEY: rule})
    return field(default=default, metadata={_KEY: rule})


def rule_of(declared: dataclasses.Field) -> Range | tuple[str, ...] | None:
    """The range or the choices that a field declares; None where its type says all."""
    return declared.metadata.get(_KEY)


def check_values(settings: Any, names: Iterable[str] | None = None) -> None:
    """Raise for the first field of a dataclass whose value is not what the field declares.

    Args:
        names: only these fields; none: all of them.

    Raises:
        UserError: the setting, its value, and what is expected.
    """
    hints = typing.get_type_hints(type(settings))
    for f in dataclasses.fields(settings):
        if names is None or f.name in names:
            check_value(f.name, getattr(settings, f.name), hints[f.name], rule_of(f))


def check_value(name: str, value: Any, hint: Any, rule: Range | tuple[str, ...] | None = None) -> None:
    """Raise unless the value is of the type and in the range."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    if any(_fits(value, kind, rule) for kind in kinds):
        return
    for kind in kinds:
        parts = _parts(value, kind)
        if wrong := [part for part in parts or [] if not _fits(part, _inner(kind), rule)]:
            raise UserError(f"{name} holds {shown(wrong[0])}; expected {_words((_inner(kind),), rule, wrong[0], several=True)}")
    raise UserError(f"{name} is {shown(value)}; expected {_words(kinds, rule, value)}")


def check_choice(name: str, value: Any, known: Iterable[str]) -> None:
    """Raise where the value is none of those known, and name its near misses."""
    check_value(name, value, str, tuple(known))


def shown(value: Any) -> str:
    """A value as a message shows it, on one line of bounded length."""
    try:
        text = repr(value)
    except ValueError:  # a whole number beyond Python's limit of digits
        text = "a number of too many digits"
    return text if len(text) <= 200 else f"{text[:200]}…"


def _fits(value: Any, kind: Any, rule) -> bool:
    if kind is Any:
        return True
    if kind is None or kind is type(None):
        return value is None
    if kind is bool:
        return isinstance(value, bool)
    if kind in (int, float):
        return _is_number(value, kind) and (not isinstance(rule, Range) or rule.holds(value)) and _is_moderate(value, kind, rule)
    if kind is str:
        return isinstance(value, str) and (not isinstance(rule, tuple) or value in rule)
    if typing.get_origin(kind) is Literal:
        return any(value == known and type(value) is type(known) for known in typing.get_args(kind))
    parts = _parts(value, kind)
    return parts is not None and all(_fits(part, _inner(kind), rule) for part in parts)


def _is_number(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond a float
        return kind is int


def _is_moderate(value: float, kind: type, rule) -> bool:
    limited = isinstance(rule, Range) and (rule.most is not None or rule.below is not None)
    return kind is float or limited or abs(value) <= MOST


def _parts(value: Any, kind: Any) -> list | None:
    """What a list or a mapping holds; None where the value is not of that kind."""
    origin = typing.get_origin(kind) or kind
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return list(value.values()) if isinstance(value, Mapping) else None
    if origin in (list, tuple):
        return list(value) if isinstance(value, list | tuple) else None
    return None


def _inner(kind: Any) -> Any:
    """The type of what a list or a mapping holds."""
    inner = [part for part in typing.get_args(kind) if part is not Ellipsis]
    return inner[-1] if inner else Any


def _words(kinds: Iterable[Any], rule, value: Any, several: bool = False) -> str:
    """What is expected, with the near misses of a value that is none of the choices."""
    options, near = [], ""
    for kind in kinds:
        literal, ruled = typing.get_origin(kind) is Literal, kind is str and isinstance(rule, tuple)
        known = typing.get_args(kind) if literal else rule if ruled else ()
        if known:
            options.append(f"one of {', '.join(known)}")
            near = near_misses(value, known) if isinstance(value, str) else ""
        elif kind in (int, float):
            word = "a whole number" if kind is int else "a number"
            range_of = rule if isinstance(rule, Range) else Range()
            if kind is int and isinstance(value, int) and abs(value) > MOST and not isinstance(value, bool):
                range_of = dataclasses.replace(range_of, most=MOST if range_of.most is None else range_of.most)
            options.append(range_of.words(word))
        elif kind is str:
            options.append("text")
        elif kind is bool:
            options.append("true or false")
        elif _parts([], kind) is not None:
            options.append("a list")
        elif _parts({}, kind) is not None:
            options.append("a mapping")
    words = " or ".join(dict.fromkeys(options)) or "nothing"
    return (re.sub(r"\ba ((?:positive |whole )*)number\b", r"\1numbers", words) if several else words) + near
