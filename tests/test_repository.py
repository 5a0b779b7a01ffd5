"""Rules about the repository itself."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from doratune.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "doratune"
FILES = sorted(SOURCE.rglob("*.py"))

LEVELS = [
    {"errors"},
    {"support", "math"},
    {"directions", "bases", "data", "publishing"},
    {"config", "layers"},
    {"adapter", "formats"},
    {"checkpoint", "baselines", "peft"},
    {"training", "analysis", "bench", "export"},
    {"evaluation", "report", "generation", "judging", "planning"},
    {"comparison", "demo", "serving"},
    {"cli"},
    {"__main__"},
]
"""Rooms from the bottom up: a room imports from its own level and below."""


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path):
    """(module of ours, is it imported when this file is?) as paths below the package without a suffix."""
    package = path.relative_to(SOURCE).parts[:-1]
    tree = ast.parse(path.read_text())
    at_once = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = package[: len(package) - node.level + 1] + tuple(filter(None, (node.module or "").split(".")))
            for alias in node.names:
                inner = SOURCE.joinpath(*parts, alias.name)
                is_module = inner.with_suffix(".py").is_file() or inner.is_dir()
                yield ((*parts, alias.name) if is_module else parts), id(node) in at_once


def test_every_room_has_a_level():
    assert {room(path) for path in FILES} - {"__init__"} == set().union(*LEVELS)


def test_imports_point_one_way():
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    wrong = [
        f"{path.relative_to(ROOT)} imports {other[0]}"
        for path in FILES
        if room(path) in level
        for other, _ in imports(path)
        if other and level[other[0]] > level[room(path)]
    ]
    assert wrong == []


def test_math_imports_torch_only():
    assert [str(path) for path in FILES if room(path) == "math" for other, _ in imports(path) if other[:1] != ("math",)] == []


def circle(graph: dict) -> list:
    """One path along the arrows that comes back to where it began, or nothing."""
    state, trail = {}, []

    def visit(node) -> list:
        state[node] = "open"
        trail.append(node)
        for other in sorted(graph.get(node, ())):
            if state.get(other) == "open":
                return [*trail[trail.index(other) :], other]
            if other not in state and (found := visit(other)):
                return found
        state[node] = "done"
        trail.pop()
        return []

    return next((found for node in sorted(graph) if node not in state and (found := visit(node))), [])


def test_no_import_circles():
    """Neither between rooms nor between files, counting imports inside functions between rooms."""
    rooms, files = {}, {}
    for path in FILES:
        own = path.relative_to(SOURCE).with_suffix("").parts
        own = own[:-1] if own[-1] == "__init__" else own
        for other, at_once in imports(path):
            if own and other and other[0] != own[0]:
                rooms.setdefault(own[0], set()).add(other[0])
            if at_once and other != own:
                files.setdefault(own, set()).add(other)
    assert circle(rooms) == []
    assert circle(files) == []


def test_files_and_functions_stay_small():
    long = []
    for path in FILES:
        text = path.read_text()
        if text.count("\n") > 300:
            long.append(f"{path.name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno > 60:
                long.append(f"{path.name}: {node.name}")
    assert long == []


def test_every_module_opens_with_a_docstring():
    assert [p.name for p in FILES if not ast.get_docstring(ast.parse(p.read_text()))] == []


def test_class_names_are_unique():
    """A name means one thing in the whole package."""
    homes: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(str(path.relative_to(SOURCE)))
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_needs_only_torch():
    code = (
        "import sys, torch; before = set(sys.modules); import doratune\n"
        "doratune.attach, doratune.save, doratune.merge, doratune.verify, doratune.AdapterConfig\n"
        "print(' '.join({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    extras = "transformers peft accelerate datasets yaml jsonargparse matplotlib plotly tqdm huggingface_hub"
    assert not set(run_python(code).split()) & set(extras.split())


def test_help_imports_nothing_heavy():
    code = "import sys; from doratune.cli.main import main; main(['--help']); print('torch' in sys.modules, file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "False"
    for command in COMMANDS:
        assert command in result.stdout
        assert (SOURCE / "cli" / f"{command}.py").is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example(command, capsys):
    from doratune.cli.main import main

    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"example: doratune {command}" in " ".join(capsys.readouterr().out.split())


def test_unknown_command_names_near_misses(capsys):
    from doratune.cli.main import main

    assert main(["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err


def test_readme_tree_is_the_disk():
    """One line for each folder and file at the top of the package, and for each folder beside it."""
    tree = re.search(r"    src/doratune/\n(.*?)\n\n", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]
    inside = [line.split()[0] for line in tree.splitlines() if line.startswith("      ")]
    beside = [line.split()[0] for line in tree.splitlines() if not line.startswith("      ")]
    assert sorted(inside) == sorted(name + "/" * (SOURCE / name).is_dir() for name in shelf(SOURCE))
    assert [name for name in beside if not (ROOT / name).is_dir()] == []


def shelf(folder: Path) -> list[str]:
    """What lies in a folder of the package, without what Python leaves there."""
    return [path.name for path in folder.iterdir() if path.name != "__pycache__"]


@pytest.mark.parametrize("folder", sorted({room(p) for p in FILES if p.parent != SOURCE}))
def test_every_folder_says_what_is_inside(folder):
    """The docstring of `__init__.py` has a line for each file and folder, and for no other."""
    docstring = ast.get_docstring(ast.parse((SOURCE / folder / "__init__.py").read_text(encoding="utf-8")))
    named = re.findall(r"^ *(\w+(?:\.\w+|/)) {3,}\S", docstring, re.MULTILINE)
    inside = {name + "/" * (SOURCE / folder / name).is_dir() for name in shelf(SOURCE / folder)}
    assert sorted(named) == sorted(inside - {"__init__.py"})


def test_recipes_are_valid_and_say_what_to_expect():
    from doratune.training.recipe import TrainRecipe

    recipes = sorted(p for p in (ROOT / "recipes").glob("*.yaml") if not p.name.startswith("compare_"))  # grids: test_compare.py
    assert {r.name for r in recipes} >= {"demo.yaml", "commonsense.yaml", "commonsense_qkv_magnitude.yaml"}
    for path in recipes:
        recipe = TrainRecipe(**yaml.safe_load(path.read_text()))
        assert recipe.source and recipe.expected, path.name
        recipe.data = recipe.data or "x.json"
        recipe.check()


def test_recipe_names_every_adapter_setting():
    """A setting added to AdapterConfig must be reachable from a recipe, under the same name and with the same default."""
    import dataclasses

    from doratune import AdapterConfig
    from doratune.training.recipe import TrainRecipe

    assert TrainRecipe(data="x").adapter() == AdapterConfig()
    assert {f.name for f in dataclasses.fields(AdapterConfig)} <= {f.name for f in dataclasses.fields(TrainRecipe)}


def test_no_paths_of_a_machine():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    pattern = re.compile("/wo" + "rk/|/ro" + "ot/|/ho" + "me/[a-z]")
    assert [f for f in files if (ROOT / f).is_file() and pattern.search((ROOT / f).read_text(errors="replace"))] == []


def test_nothing_is_tracked_that_a_build_leaves():
    """Nor what a package manager or an editor does."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    built = re.compile(r"\.(whl|pyc|pyo|so|o|egg|zip|gz|log|swp|orig)$|\.egg-info/|(^|/)(build|dist|site|__pycache__|\.venv|runs)/")
    assert [name for name in files if built.search(name)] == []


def test_every_defect_names_a_test_that_exists():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs" / "defects.md").read_text(encoding="utf-8"))
    assert len(named) > 15
    for file, test in named:
        path = next((ROOT / "tests").rglob(file))
        assert f"def {test}(" in path.read_text(encoding="utf-8"), f"{file}::{test}"
