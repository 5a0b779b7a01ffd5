"""What the segmentation benchmark takes for a figure, and that its base is a model that doratune trains."""

import importlib.util
import sys

import numpy as np
import pytest
from transformers import AutoModelForSemanticSegmentation

from doratune.support.image_models import load_processor


@pytest.fixture(scope="module")
def segmentation(pytestconfig):
    folder = pytestconfig.rootpath / "benchmarks"
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("segmentation", folder / "segmentation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(folder))
    return module


def test_the_figure_is_what_is_far_from_the_border_s_colour(segmentation):
    pixels = np.full((12, 10, 3), (248, 234, 230), np.uint8)
    pixels[3:7, 4:9] = (10, 20, 200)
    pixels[2, 4:9] = (230, 220, 228)  # a soft edge, still of the background
    figure = segmentation.figure_of(pixels)
    assert figure.sum() == 20 and figure[3:7, 4:9].all()
    assert not segmentation.figure_of(np.full((5, 5, 3), 250, np.uint8)).any()


def test_the_base_and_its_processor(segmentation, tmp_path):
    segmentation.write_start(tmp_path / "start")
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "start")
    assert model.config.num_labels == len(segmentation.COLOURS) + 1
    assert load_processor(str(tmp_path / "start")).size == {"height": 64, "width": 64}
