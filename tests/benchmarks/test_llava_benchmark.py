"""The LLaVA benchmark's own parts: its data, a base of tower and language model in the stages of LLaVA, its grid."""

import argparse
import importlib.util
import json

import pytest
import torch
from easy_images import small_set

from doratune.comparison.launch import only_one
from doratune.data.image_reader import load_reader
from doratune.errors import UserError
from doratune.evaluation.images import sources
from doratune.evaluation.tasks import load_task
from doratune.support.image_text import parts_of
from doratune.support.models import load_model
from doratune.training.examples import read_examples
from doratune.training.recipe import TrainRecipe


@pytest.fixture(scope="module")
def bench(pytestconfig, tmp_path_factory):
    folder, patch = tmp_path_factory.mktemp("easy"), pytest.MonkeyPatch()
    patch.syspath_prepend(str(pytestconfig.rootpath / "benchmarks"))
    spec = importlib.util.spec_from_file_location("llava_benchmark", pytestconfig.rootpath / "benchmarks" / "llava.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    patch.setattr(module, "data_folder", lambda: small_set(folder))
    yield module
    patch.undo()


@pytest.fixture(scope="module")
def built(bench, tmp_path_factory):
    """(output folder, its base)."""
    output = tmp_path_factory.mktemp("llava")
    assert bench.write_data(output, 40, 10) == {"images": 30, "train": 40, "test": 10}
    tower = bench.write_tower(output, 30, 0.05)
    return output, bench.write_base(output, tower, str(bench.write_language(output, 2)), 2)


def test_the_base_is_the_language_model_that_sees(bench, built):
    """Its language model is as it was; tower and projector have moved from the start."""
    output, folder = built
    base, start, language = load_model(str(folder)), load_model(str(output / "start")), load_model(str(output / "language"))
    own, parts = dict(base.named_parameters()), parts_of(base)
    for name, p in language.model.named_parameters():
        grown = own[f"{parts.language}.{name}"]
        assert torch.equal(grown[: len(p)], p)  # one row more: the mark of an image
    moved = {name for name, p in start.named_parameters() if not torch.equal(p, own[name])}
    assert moved and all(name.startswith(parts.beside) for name in moved)


def test_a_question_is_asked_in_the_test_as_in_training(bench, built):
    output, folder = built
    reader = load_reader(str(folder))
    recipe = TrainRecipe(model=str(folder), data=str(output / "train.json"), output=str(output / "x"))
    rows = read_examples(recipe, reader, lambda line: None).rows
    items = json.loads((output / "train.json").read_text())
    first = items[0]["conversations"][0]["value"].removeprefix("<image>\n")
    asked = reader.question(first, rows[0]["images"])
    assert rows[0]["input_ids"][: len(asked)] == asked and asked.count(reader.mark) == 16
    assert reader.decode(rows[0]["input_ids"][len(asked) :]).split()[:2] == [items[0]["conversations"][1]["value"], "</s>"]
    name, tests = load_task(str(output / "easy_vqa.json"))
    assert name == "easy_vqa" and all(sources(item) for item in tests)


@pytest.mark.parametrize("methods", [["full", "lora", "dora"], ["full", "lora", "dora", "dvora"]])
def test_the_grid(bench, built, methods):
    output, folder = built
    settings = {"methods": methods, "questions": 1000, "rank": 4, "epochs": 1, "seeds": 2, "dtype": "float32"}
    arguments = argparse.Namespace(output=output, ranks=[], spread=bench.SPREAD, **settings)
    grid = bench.grid_of(arguments, folder)
    shared = grid.check()
    assert [len(set(grid.lrs_of(method, shared))) for method in methods] == [len(bench.SPREAD)] * len(methods)
    assert shared.eval_size == 200 and grid.score == shared.tasks_protocol == "generate"


def test_a_second_start_is_refused(bench, tmp_path):
    with only_one(tmp_path), pytest.raises(UserError, match="is in use"):
        bench.main(["--output", str(tmp_path)])
