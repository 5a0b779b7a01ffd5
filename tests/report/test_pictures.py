"""A report about a model of images: each sample's image beside its question, also in a real browser; a lost one is a warning."""

import json

import browser as chromium
import pytest
from pictures import image_folder, llava_items, model_folder, write_items

from doratune.evaluation.evaluate import after_training
from doratune.report.page import build
from doratune.training.recipe import TrainRecipe
from doratune.training.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    model_folder(folder / "model")
    image_folder(folder / "images")
    write_items(folder / "train.json", llava_items(8))
    asked = [{"image": f"{c}.png", "question": "What colour is it?", "answer": c} for c in ("red", "green", "blue", "white")]
    write_items(folder / "colours.json", asked)
    settings = {"model": str(folder / "model"), "data": str(folder / "train.json"), "images": str(folder / "images")}
    settings |= {"rank": 2, "max_steps": 1, "batch_size": 4, "dtype": "float32", "tensorboard": False}
    recipe = TrainRecipe(**settings, output=str(folder / "run"), tasks=[str(folder / "colours.json")], tasks_protocol="generate")
    train(recipe, say=len, score=after_training(recipe, len))
    return folder / "run"


def test_every_sample_has_its_own_image(run, tmp_path):
    build([run], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    images = [part.partition('"')[0] for part in text.split('<img src="')[1:]]
    assert len(images) == len(set(images)) == 4 and all(image.startswith("data:image/jpeg;base64,") for image in images)
    if not chromium.missing():
        with chromium.launched() as browser:
            page = browser.new_page()
            page.goto((tmp_path / "page.html").as_uri())
            sizes = page.eval_on_selector_all("article img", "all => all.map(one => one.naturalWidth)")
            assert len(sizes) == 4 and all(size > 0 for size in sizes)


def test_a_lost_image_is_a_warning_and_the_page_comes_out(run, tmp_path):
    file = run / "scores" / "after" / "colours.generate.jsonl"
    before = file.read_text()
    records = [json.loads(line) for line in before.splitlines()]
    records[0]["image"] = str(tmp_path / "gone.png")
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    build([run], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count('<img src="data:') == 3 and "gone.png is not shown beside its sample: no such image file" in text
    file.write_text(before)
