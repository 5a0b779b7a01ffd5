"""Settings that one dataclass declares and others offer too: types, defaults, ranges and documentation, taken over as they are.

    @dataclass(kw_only=True)
    @with_settings_of(AdapterConfig)
    class TrainRecipe: ...

What YAML cannot say becomes what it can: a tuple is a list there, any mapping a dict. The documentation is the string below a
field, read from the class's source; it goes into the docstring's "Args:", from which `--help` is made. Cost: one parse.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Callable
from functools import cache
from typing import TypeVar

T = TypeVar("T")


def setting_names(source: type) -> list[str]:
    """The names of a dataclass's fields, in their order."""
    return [f.name for f in dataclasses.fields(source)]


def with_settings_of(source: type, after: str | None = None) -> Callable[[type[T]], type[T]]:
    """A decorator, below `@dataclass`: the class offers every setting of `source` too.

    Args:
        source: a dataclass with a string below each field.
        after: the field that they follow, in the docstring and in --help; none: they come last.

    A setting that the class's own "Args:" names as well has both texts there, the source's first.
    """

    def extended(cls: type[T]) -> type[T]:
        settings = {f.name: f for f in dataclasses.fields(source)}
        annotations = dict(inspect.get_annotations(cls))
        place = list(annotations).index(after) + 1 if after else len(annotations)
        own = list(annotations.items())
        added = [(name, _as_yaml(source, f)) for name, f in settings.items() if name not in annotations]
        cls.__annotations__ = dict([*own[:place], *added, *own[place:]])
        for name, _ in added:
            setattr(cls, name, _default(settings[name]))
        cls.__doc__ = _described(cls.__doc__, documentation(source), after)
        return cls

    return extended


def documented(cls: type[T]) -> type[T]:
    """A decorator, above `@dataclass`: `help(cls)` shows the string below each field."""
    texts = documentation(cls)
    head, raises, rest = inspect.cleandoc(cls.__doc__).partition("\nRaises:")
    cls.__doc__ = f"{head}\nArgs:\n" + "".join(f"    {name}: {text}\n" for name, text in texts.items()) + raises + rest
    return cls


@cache
def documentation(cls: type) -> dict[str, str]:
    """{field: the string below it, on one line}, of a dataclass and its bases; nothing where the source is not at hand."""
    texts: dict[str, str] = {}
    for part in (base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0].body
        except (OSError, TypeError):
            continue
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[field.target.id] = " ".join(str(text.value.value).split())
    return texts


def argument_texts(cls: type) -> dict[str, str]:
    """{setting: its text in the docstring's "Args:", on one line}."""
    return {name: " ".join(text.split()) for name, text in _entries(cls.__doc__ or "").items()}


def _entries(doc: str) -> dict[str, str]:
    """{name: text} of a docstring's "Args:", its last section."""
    args = inspect.cleandoc(doc).partition("\nArgs:\n")[2]
    return dict(re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", args, re.MULTILINE))


def _as_yaml(source: type, field: dataclasses.Field):
    """`str | tuple[str, ...]` → `str | list[str]`, `Mapping[str, int]` → `dict[str, int]`: a type, not its name, since one name
    that a class's module lacks would switch off the check of every setting."""
    words = field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)
    words = re.sub(r"\bMapping\[", "dict[", re.sub(r"\btuple\[(\w+), \.\.\.\]", r"list[\1]", words))
    home = next(cls for cls in source.__mro__ if field.name in inspect.get_annotations(cls))
    return eval(words, dict(vars(sys.modules[home.__module__])))


def _default(field: dataclasses.Field):
    rule = field.metadata
    if field.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=field.default_factory, metadata=rule)
    if isinstance(field.default, tuple):
        return dataclasses.field(default_factory=lambda: list(field.default), metadata=rule)
    return dataclasses.field(default=field.default, metadata=rule)


def _described(doc: str, texts: dict[str, str], after: str | None) -> str:
    """The docstring with the texts among its "Args:", its last section."""
    head, entries = inspect.cleandoc(doc).partition("\nArgs:\n")[0], _entries(doc)
    own = [(name, f"{texts[name]} {text}" if name in texts else text) for name, text in entries.items()]
    place = list(entries).index(after) + 1 if after else len(own)
    added = [(name, text) for name, text in texts.items() if name not in entries]
    return f"{head}\nArgs:\n" + "\n".join(f"    {name}: {text}" for name, text in [*own[:place], *added, *own[place:]])
