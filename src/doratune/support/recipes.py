"""Recipes: files of one's own, and those that come with the package, by their names.

`recipes/demo.yaml` and `demo.yaml` mean the file of that name here, else the one that was installed: in a wheel inside this
package, in a checkout at its top.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError, near_misses

PACKAGE = Path(__file__).resolve().parents[1]


def recipes_folder() -> Path:
    """Where the recipes that come with the package lie."""
    return next((folder for folder in (PACKAGE / "recipes", PACKAGE.parents[1] / "recipes") if folder.is_dir()), PACKAGE)


def here_or_shipped(name: str) -> Path:
    """The file of this name here; else the recipe that comes with the package; else the name as it is."""
    path = Path(name)
    ours = recipes_folder() / path.name
    return ours if not path.exists() and str(path.parent) in (".", "recipes") and ours.is_file() else path


def recipe_file(name: str) -> Path:
    """The file that a recipe's name means.

    Raises:
        UserError: there is none; its near misses.
    """
    path = here_or_shipped(name)
    if path.exists():
        return path
    ours = [recipe.name for recipe in sorted(recipes_folder().glob("*.yaml"))]
    beside = [str(other) for other in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    near = near_misses(name, [*beside, *ours, *(f"recipes/{recipe}" for recipe in ours)])
    raise UserError(f"{name}: no such recipe; see recipes/ for examples{near}")
