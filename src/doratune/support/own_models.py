"""Classes of models that are ours and stand beside those of transformers: a folder's config names them, as any other.

    vl_bart.py   VLBartForConditionalGeneration

Their configs are transformers' own, with what is theirs in one entry; so AutoConfig reads such a folder without being told of the
class. Cost: none, until one is asked for.
"""

from __future__ import annotations

import importlib

MODULES = {"VLBartForConditionalGeneration": "vl_bart"}
"""Class → its file in this folder."""


def own_class(name: str) -> type | None:
    """The class of that name; None where it is none of ours."""
    return getattr(importlib.import_module(f".{MODULES[name]}", __package__), name) if name in MODULES else None


def is_own(name: str | None) -> bool:
    """Is it the name of one of our classes?"""
    return name in MODULES


def own_library(cls: type) -> str | None:
    """The library whose configs a class of ours has; None for any other class."""
    return "transformers" if cls.__name__ in MODULES and cls.__module__.startswith(f"{__package__}.") else None
