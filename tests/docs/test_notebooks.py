"""The notebooks run from the top to the end, on a tiny model: the first here, all of them with DORATUNE_LONG=1."""

import json
import os
import sys
from pathlib import Path

import pytest
from pages import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
QUICK = "first_run.ipynb"


def wide_model(folder: Path) -> Path:
    """A tiny model whose layers have widths of which bitsandbytes' CPU kernels are made."""
    from conftest import small_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_the_top_to_the_end(path, tmp_path, monkeypatch, tiny_folder):
    if path.name != QUICK and not os.environ.get("DORATUNE_LONG"):
        pytest.skip("half a minute each; set DORATUNE_LONG=1")
    model = wide_model(tmp_path / "tiny") if path.stem == "qdora" else tiny_folder
    for name, value in {"MODEL": str(model), "STEPS": "3", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(
        "PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )  # as an activated environment has it
    book = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
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
