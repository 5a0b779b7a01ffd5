"""A wheel of this tree, and fresh environments that have it and chosen packages of the running one: nothing is downloaded."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "recipes", "src")


def build_wheel(folder: Path) -> Path:
    """The wheel, built from a copy: setuptools leaves files where it builds."""
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, source / name)
    words = ["wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(source)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    return wheel


def environment(folder: Path, wheel: Path, packages: Path) -> Path:
    """A new environment with the wheel alone, which sees besides the packages in a folder; its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    words = ["--python", str(python), "install", "-q", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, timeout=300)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True
    )
    # A path in a .pth file: .pth files in that folder, such as an editable install's, are not read.
    (Path(site.stdout.strip()) / "others.pth").write_text(f"{packages}\n", encoding="utf-8")
    return python


def all_packages() -> Path:
    return Path(sysconfig.get_path("purelib"))


def chosen_packages(folder: Path, names: list[str]) -> Path:
    """A folder with links to these distributions of the running environment and to what they need."""
    folder.mkdir()
    waiting, seen = list(names), set()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            target = folder / top
            if not target.exists() and (all_packages() / top).exists():
                target.symlink_to(all_packages() / top)
        needs = [line for line in distribution.requires or () if "extra" not in line]
        waiting += [re.match(r"[\w.-]+", line)[0] for line in needs]
    return folder
