"""What the vision benchmark reads from questions and answers, and that its grid is one that doratune compare takes."""

import argparse
import importlib.util

import pytest


@pytest.fixture(scope="module")
def vision(pytestconfig):
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath / "benchmarks"))
    spec = importlib.util.spec_from_file_location("vision", pytestconfig.rootpath / "benchmarks" / "vision.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    monkeypatch.undo()


def test_shape_and_colour_from_questions_and_answers(vision):
    told = {
        0: [("what is the red shape?", "triangle"), ("what color is the triangle?", "red")],
        1: [("is there a circle?", "yes"), ("is no teal shape present?", "no")],
        2: [("is there not a circle?", "yes"), ("does the image contain a rectangle?", "yes"), ("is a gray shape present?", "yes")],
        3: [("is there a circle?", "no"), ("what color is the shape?", "blue")],
        4: [("does the image not contain a circle?", "yes"), ("is no blue shape present?", "yes")],
    }
    questions = [(question, answer, image) for image, pairs in told.items() for question, answer in pairs]
    assert vision.classes(questions) == {0: ("triangle", "red"), 1: ("circle", "teal"), 2: ("rectangle", "gray")}


@pytest.mark.parametrize("sweep", [False, True])
@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_the_grid_and_its_base(vision, kind, sweep, tmp_path):
    vision.write_start(kind, tmp_path / "base")
    (tmp_path / "figures.csv").write_text("path,label,split\n")
    arguments = argparse.Namespace(output=tmp_path, methods=list(vision.RATES), rank=4, epochs=1, seeds=2, sweep=sweep)
    grid = vision.grid_of(arguments, tmp_path / "base")
    shared = grid.check()
    assert shared.objective == "image_classification"
    assert {len(grid.lrs_of(method, shared)) for method in grid.methods} == {len(vision.SPREAD) if sweep else 1}
