"""The notebooks run from the top to the end, on a tiny model: the first here, all of them with DORATUNE_LONG=1."""

import json
import os

import pytest
from pages import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
QUICK = "first_run.ipynb"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_the_top_to_the_end(path, tmp_path, monkeypatch, tiny_folder):
    if path.name != QUICK and not os.environ.get("DORATUNE_LONG"):
        pytest.skip("half a minute each; set DORATUNE_LONG=1")
    for name, value in {"MODEL": str(tiny_folder), "STEPS": "3", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}.items():
        monkeypatch.setenv(name, value)
    book = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_without_outputs_and_opens_with_words(path):
    book = json.loads(path.read_text(encoding="utf-8"))
    nbformat.validate(nbformat.reads(json.dumps(book), as_version=4))
    assert book["cells"][0]["cell_type"] == "markdown"
    assert [cell for cell in book["cells"] if cell.get("outputs") or cell.get("execution_count")] == []


def test_there_are_the_three_that_the_pages_name():
    assert {path.stem for path in NOTEBOOKS} >= {"first_run", "own_data", "qdora"}
