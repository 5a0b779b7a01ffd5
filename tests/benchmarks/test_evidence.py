"""docs/evidence.md says what benchmarks/results/ says."""

import importlib.util
import json
import shutil

import pytest

from doratune.errors import UserError
from doratune.support.tables import placed


@pytest.fixture(scope="module")
def evidence(pytestconfig):
    spec = importlib.util.spec_from_file_location("evidence", pytestconfig.rootpath / "benchmarks" / "evidence.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_files_say(evidence, pytestconfig, tmp_path):
    root = pytestconfig.rootpath
    for folder in ("docs", "benchmarks/results"):
        shutil.copytree(root / folder, tmp_path / folder)
    page = tmp_path / "docs" / "evidence.md"
    evidence.main(tmp_path)
    assert page.read_text() == (root / "docs" / "evidence.md").read_text()
    assert set(evidence.tables(root / "benchmarks" / "results")) == {
        "compare_demo", "compare_four_tasks", "compare_llava", "movement_four_tasks", "movement_llava", "evaluation",
    }  # fmt: skip


def test_a_changed_figure_changes_the_page(evidence, pytestconfig, tmp_path):
    for folder in ("docs", "benchmarks/results"):
        shutil.copytree(pytestconfig.rootpath / folder, tmp_path / folder)
    path = tmp_path / "benchmarks" / "results" / "movement_four_tasks.json"
    found = json.loads(path.read_text())
    next(iter(found.values()))["line"]["correlation"] = 0.123
    path.write_text(json.dumps(found))
    evidence.main(tmp_path)
    assert "+0.12" in (tmp_path / "docs" / "evidence.md").read_text()


def test_a_page_without_its_place_is_a_line(tmp_path):
    (tmp_path / "page.md").write_text("no markers")
    with pytest.raises(UserError, match=r"page\.md lacks the markers"):
        placed(tmp_path / "page.md", "x", "y")
