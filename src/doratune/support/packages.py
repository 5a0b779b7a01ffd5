"""What the package asks of others, from its own metadata: which extra brings a module, what is missing, what has a wrong version.

Cost: reads the metadata of installed distributions; imports none of them.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
from typing import NamedTuple

NAME = "doratune"

MODULES = {"pyyaml": "yaml", "pillow": "PIL", "scikit-learn": "sklearn", "pytest-xdist": "xdist", "mlflow-skinny": "mlflow"}
"""Distributions whose module has another name."""


class Wish(NamedTuple):
    """One requirement: a distribution, the versions that do (`>=5.0`, or ""), and the extra that asks for it ("" for the core)."""

    distribution: str
    versions: str
    extra: str

    @property
    def module(self) -> str:
        name = self.distribution.lower()
        return MODULES.get(name, name.replace("-", "_"))

    @property
    def plain(self) -> str:
        """Its name in lower case with hyphens, as `brought_along` has it."""
        return _plain(self.distribution)

    @property
    def installed(self) -> str | None:
        """The installed version."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    def fits(self) -> bool:
        """Is an installed version among those that do? True where it cannot be told: `packaging` reads versions."""
        try:
            from packaging.specifiers import SpecifierSet
        except ModuleNotFoundError:
            return True
        return SpecifierSet(self.versions).contains(self.installed, prereleases=True)


def wishes() -> list[Wish]:
    """Every requirement that applies to this platform, the core's first; nothing for sources that are not installed."""
    try:
        lines = importlib.metadata.requires(NAME) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [wish for line in lines if (wish := _wish(line)) is not None]


def brought_along() -> set[str]:
    """Distributions that another installed one than ours requires, in lower case with hyphens: that they are here says nothing of
    an extra. Cost: the metadata of all that is installed."""
    lines = (
        line
        for distribution in importlib.metadata.distributions()
        if _plain(distribution.name or "") != NAME
        for line in distribution.requires or ()
    )
    return {_plain(re.match(r"\s*([\w.-]+)", line)[1]) for line in lines if "extra" not in line.partition(";")[2]}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _wish(line: str) -> Wish | None:
    """`jsonargparse[signatures]>=4.40; extra == "train"` → (jsonargparse, >=4.40, train); None for other platforms."""
    text, _, marker = line.partition(";")
    name, versions = re.fullmatch(r"\s*([\w.-]+)(?:\[[^]]*\])?\s*\(?([^()]*?)\)?\s*", text).groups()
    extra = re.search(r"""extra\s*==\s*["']([\w-]+)["']""", marker)
    extra = extra.group(1) if extra else ""
    if marker and not _applies(marker, extra):
        return None
    return Wish(name, versions.replace(" ", ""), extra)


def _applies(marker: str, extra: str) -> bool:
    try:
        from packaging.markers import Marker
    except ModuleNotFoundError:
        return True
    return Marker(marker).evaluate({"extra": extra})


def install_line(module: str) -> str:
    """The `pip install` that brings a module: an extra of ours, or the module by its name."""
    top = module.partition(".")[0]
    extras = [wish.extra for wish in wishes() if wish.module.lower() == top.lower()]
    if not extras:
        return f"pip install {top}"
    return f"pip install '{NAME}[{extras[0]}]'" if all(extras) else f"pip install {NAME}"


def wanted_by(message: str) -> str | None:
    """`needs PIL; pip install …` for what transformers says of a package that one of its classes lacks, else None."""
    found = re.search(r"requires the (\w+) library but", message)
    return f"needs {found[1]}; {install_line(found[1] if found[1] == 'PIL' else found[1].lower())}" if found else None


def versions() -> dict[str, str]:
    """Python, torch and transformers, as far as they are installed."""
    known = {name: Wish(name, "", "").installed for name in ("torch", "transformers")}
    return {"Python": platform.python_version()} | {name: version for name, version in known.items() if version}
