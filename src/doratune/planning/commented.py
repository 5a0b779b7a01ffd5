"""A recipe as a person reads it: each setting below the reason for its value.

What it holds is checked as `doratune train` checks it, so a recipe that is written here runs.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ..support.yaml_text import parse_yaml, to_yaml
from ..training.recipe import TrainRecipe
from .start import Chosen

MARK = "# Written by doratune init"
WIDTH = 120


def recipe_text(head: Sequence[str], settings: Mapping[str, Any]) -> str:
    """The recipe in YAML.

    Args:
        head: lines above it. settings: {name: value, or a Chosen}; an empty reason is left out.

    Raises:
        UserError: settings that `doratune train` would refuse.
    """
    lines = [f"# {line}" for paragraph in head for line in textwrap.wrap(paragraph, WIDTH)]
    for name, setting in settings.items():
        value, reason = setting if isinstance(setting, Chosen) else (setting, "")
        lines += [f"# {line}" for line in textwrap.wrap(reason, WIDTH)]
        lines.append(f"{name}: {to_yaml(value, flow=True)}")
    text = "\n".join(lines) + "\n"
    recipe = TrainRecipe(**parse_yaml(text))
    recipe.data = recipe.data or "any"
    recipe.check()
    return text
