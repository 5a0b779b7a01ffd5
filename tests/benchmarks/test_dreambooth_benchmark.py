"""What the DreamBooth benchmark tells of images, and the summary of its runs."""

import importlib.util
import sys

import pytest
from PIL import Image, ImageDraw


@pytest.fixture(scope="module")
def benchmark(pytestconfig):
    folder = pytestconfig.rootpath / "benchmarks"
    sys.path.insert(0, str(folder))  # it reads easy-vqa's classes as the benchmark of classifiers does
    try:
        spec = importlib.util.spec_from_file_location("dreambooth_benchmark", folder / "dreambooth.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


def test_the_colour_of_a_figure(benchmark):
    for name, value in benchmark.RGB.items():
        image = Image.new("RGB", (32, 32), (240, 236, 250))
        ImageDraw.Draw(image).polygon([(8, 20), (14, 8), (20, 20)], fill=value)
        assert benchmark.colour_of(image) == name
    assert benchmark.colour_of(Image.new("RGB", (32, 32), (240, 236, 250))) == "none"


def test_the_tokenizer_has_a_token_for_each_word(benchmark, tmp_path):
    words = benchmark.tokenizer(tmp_path)
    for caption in ("a red circle", "a sks triangle", "a teal rectangle"):
        assert words.tokenize(caption) == [f"{word}</w>" for word in caption.split()]


def test_methods_are_compared_seed_by_seed(benchmark):
    pytest.importorskip("scipy")
    runs = {"lora": [{"x": 1.0}, {"x": 2.0}, {"x": 3.0}], "dora": [{"x": 0.5}, {"x": 1.5}, {"x": 2.6}]}
    summary = benchmark.summarized(runs)
    assert summary["lora"]["x"]["mean"] == 2.0 and summary["dora - lora"]["x"]["mean"] == pytest.approx(-1.4 / 3)
    assert summary["dora - lora"]["x"]["low"] > -0.65 and summary["dora - lora"]["x"]["high"] < -0.3
    one = benchmark.summarized({"lora": [{"x": 1.0}]})
    assert one["lora"]["x"]["low"] is None and "dora - lora" not in one
