"""The public names have types: the stub lists what the package loads, every signature says what it takes and gives, and a strict
checker agrees with a user's file."""

import ast
import importlib
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import doratune

ROOT = Path(__file__).resolve().parents[2]
STUB = ROOT / "src" / "doratune" / "__init__.pyi"
FUNCTIONS = [name for name in doratune.__all__ if inspect.isfunction(getattr(doratune, name))]


def stub_imports() -> dict[str, str]:
    """{public name: the module that the stub takes it from}."""
    found = {}
    for node in ast.parse(STUB.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            found |= {alias.asname: "." * node.level + (node.module or "") for alias in node.names}
    return found


def test_the_stub_is_what_the_package_loads():
    listed = stub_imports()
    packages = {name for name, module in listed.items() if module == "."}
    assert set(listed) - packages == set(doratune.__all__)
    assert packages == {name for name in dir(doratune) if inspect.ismodule(getattr(doratune, name, None))} & packages
    assert packages >= set(doratune._PACKAGES)
    for name in doratune.__all__:
        assert getattr(importlib.import_module(listed[name], "doratune"), name) is getattr(doratune, name)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_signature_is_whole(name):
    signature = inspect.signature(getattr(doratune, name))
    said = [*signature.parameters.values()]
    assert [p.name for p in said if p.annotation is p.empty] == []
    assert signature.return_annotation is not signature.empty
    for text in [str(p.annotation) for p in said] + [str(signature.return_annotation)]:
        for bare in ("dict", "list", "Sequence", "Mapping", "Iterator", "Callable", "tuple"):
            assert text.count(bare) == text.count(f"{bare}["), text


def test_the_user_s_file_uses_every_public_name():
    tree = ast.parse((Path(__file__).parent / "public_names.py").read_text(encoding="utf-8"))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(doratune.__all__) - used == set()


@pytest.mark.skipif(not shutil.which("basedpyright", path=str(Path(sys.executable).parent)), reason="no basedpyright")
def test_a_strict_checker_agrees_and_sees_mistakes(tmp_path):
    """It is the file's errors that count; the mistakes show that types arrive at all, and are no `Any`."""
    good = (Path(__file__).parent / "public_names.py").read_text(encoding="utf-8")
    wrong = {
        "rank=4, alpha": 'rank="four", alpha',
        "doratune.names(model)": 'doratune.names("model")',
        "check_base=False": "chek_base=False",
        "count = doratune.merge(model, ": "count = doratune.merge(3, ",
        "doratune.detach(doratune": "doratune.detatch(doratune",
    }
    (tmp_path / "good.py").write_text(good, encoding="utf-8")
    for i, (before, after) in enumerate(wrong.items()):
        assert before in good
        (tmp_path / f"wrong{i}.py").write_text(good.replace(before, after), encoding="utf-8")
    import json

    run = subprocess.run(
        [Path(sys.executable).parent / "basedpyright", "--level", "error", "--outputjson", "--pythonpath", sys.executable, "-p"]
        + [write_settings(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    complaints = [d for d in json.loads(run.stdout)["generalDiagnostics"] if d["severity"] == "error"]
    files = [Path(d["file"]).name for d in complaints]
    assert "good.py" not in files, [d["message"] for d in complaints if d["file"].endswith("good.py")]
    assert {f"wrong{i}.py" for i in range(len(wrong))} <= set(files)


def write_settings(folder: Path) -> str:
    import json

    settings = {
        "typeCheckingMode": "strict",
        "extraPaths": [str(ROOT / "src")],
        "include": [str(folder)],
        "useLibraryCodeForTypes": True,
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    return str(folder)
