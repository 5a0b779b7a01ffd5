"""The VL-BART benchmark's own parts: items of four tasks from questions and images, a BART of their words, its grid."""

import argparse
import importlib.util
from pathlib import Path

import pytest
from easy_images import small_set

from doratune.data.visual_tasks import load_visual_items
from doratune.support.vl_bart import visual_input


@pytest.fixture(scope="module")
def bench(pytestconfig, tmp_path_factory):
    """The benchmark over a set of 30 images in easy-vqa's layout."""
    folder, patch = tmp_path_factory.mktemp("easy"), pytest.MonkeyPatch()
    patch.syspath_prepend(str(pytestconfig.rootpath / "benchmarks"))
    spec = importlib.util.spec_from_file_location("vl_bart_benchmark", pytestconfig.rootpath / "benchmarks" / "vl_bart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    patch.setattr(module, "data_folder", lambda: small_set(folder))
    yield module
    patch.undo()


def test_items_of_four_tasks(bench, tmp_path):
    counts = bench.write_data(tmp_path, 24)
    assert counts["train"] == {"vqa": 24, "nlvr": 24, "caption": 24, "tvqa": 24} and set(counts["test"].values()) == {20}
    items = load_visual_items(str(tmp_path / "train.json"))
    assert {item.task for item in items} == set(bench.TASKS)
    pairs = [item for item in items if item.task == "nlvr"]
    for item in pairs:
        shapes = [int(sight.path.rpartition("/")[2].removesuffix(".png")) % 2 for sight in item.sights]
        assert item.answers == ("true" if shapes[0] == shapes[1] else "false",)
    assert {item.answers for item in pairs} == {("true",), ("false",)}
    films = [item for item in items if item.task == "tvqa"]
    counted = [item for item in films if item.question == "how many pictures?"]
    frames = [len(list(Path(item.sights[0].path).iterdir())) for item in counted]
    assert frames and [str(count) for count in frames] == [item.answers[0] for item in counted]


@pytest.mark.parametrize("sweep", [False, True])
def test_bart_and_the_grid(bench, sweep, tmp_path):
    bench.write_data(tmp_path, 24)
    bart = bench.write_bart(tmp_path, 2)
    assert visual_input(str(bart)) is None
    arguments = argparse.Namespace(output=tmp_path, rank=4, epochs=2, seeds=2, sweep=sweep)
    grid = bench.grid_of(arguments, bart, tmp_path / "tower", 120)
    shared = grid.check()
    assert shared.objective == "vl_bart" and shared.max_steps == 4 * shared.save_steps
    assert {len(grid.lrs_of(method, shared)) for method in grid.methods} == {len(bench.SPREAD) if sweep else 1}
