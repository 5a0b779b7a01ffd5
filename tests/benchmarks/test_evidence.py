"""docs/evidence.md says what benchmarks/results/ says."""

import importlib.util
import json
import shutil

import numpy as np
import pytest

from doratune.analysis.points import Point, regression
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
        "compare_demo", "compare_four_tasks", "movement", "evaluation",
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


def test_the_correlation_is_the_analysis(evidence):
    random = np.random.default_rng(0)
    pairs = [(x, 0.5 * x + y) for x, y in random.normal(size=(30, 2))]
    points = [{"layer": i, "module": "q", "direction": d, "magnitude": g} for i, (d, g) in enumerate(pairs)]
    expected = regression([Point("", p["layer"], "q", 0, p["magnitude"], p["direction"]) for p in points]).correlation
    assert evidence.correlation(points) == pytest.approx(expected)
    low, high = evidence.interval(points, 300)
    assert -1 <= low < expected < high <= 1
    assert evidence.interval(points * 2, 300) == pytest.approx((low, high))  # checkpoints of a weight are no new evidence


def test_a_page_without_its_place_is_a_line(tmp_path):
    (tmp_path / "page.md").write_text("no markers")
    with pytest.raises(UserError, match=r"page\.md lacks the markers"):
        placed(tmp_path / "page.md", "x", "y")
