"""The seven benchmarks asked of a model: images where the published folders have them, the same answers at every batch size."""

import base64
import io

import pytest
from pictures import FAMILIES
from PIL import Image
from test_published_benchmarks import MAKERS

from doratune.data.image_reader import ImageReader
from doratune.errors import UserError
from doratune.evaluation.evaluate import evaluate
from doratune.evaluation.generate import read_output
from doratune.evaluation.images import prompt_tokens
from doratune.evaluation.tasks import load_task

PLACES = {"vqav2": "val2014", "textvqa": "train_images", "vizwiz": "val", "gqa": "images", "science_qa": "test", "pope": "val2014"}


@pytest.fixture(scope="module")
def llava():
    model, processor = FAMILIES["llava"]()
    return model, ImageReader(processor, "llava")


def questions(name, folder):
    """The task's items, with a picture at each published place."""
    MAKERS[name](folder)
    if name == "mmbench":
        data = io.BytesIO()
        Image.new("RGB", (20, 12), (200, 0, 0)).save(data, "JPEG")
        table = folder / "mmbench_dev_20230712.tsv"
        table.write_text(table.read_text().replace("aGk=", base64.b64encode(data.getvalue()).decode()))
        return load_task(f"{name}:{folder}")
    task = load_task(f"{name}:{folder}")
    for n, image in enumerate(sorted({item["image"] for item in task[1] if item["image"]})):
        path = folder / PLACES[name] / image
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16 + n, 16), (60 * n % 255, 200, 50)).save(path)
    return task


@pytest.mark.parametrize("name", MAKERS)
def test_a_model_answers_and_the_batch_size_does_not_matter(name, tmp_path, llava):
    model, reader = llava
    task = questions(name, tmp_path)
    single, batched = (
        evaluate(model, reader, [task], ["generate"], batch_size=size, max_new_tokens=5, output=tmp_path / f"out{size}")
        for size in (1, 8)
    )
    same = ("accuracy", "right", "total", "unparsable", "chance", "majority")
    assert [single["results"][0][key] for key in same] == [batched["results"][0][key] for key in same]
    files = [(tmp_path / f"out{size}" / f"{name}.generate.jsonl").read_text() for size in (1, 8)]
    assert files[0] == files[1] and files[0].count("\n") == len(task[1])


@pytest.mark.parametrize("name", MAKERS)
def test_an_image_that_is_not_there_is_named_with_its_question(name, tmp_path, llava):
    _, reader = llava
    MAKERS[name](tmp_path)
    _, items = load_task(f"{name}:{tmp_path}")
    item = next(item for item in items if item["image"])
    with pytest.raises(UserError) as stop:
        prompt_tokens(reader, "?", item)
    assert f"{name}:{tmp_path}: question {item['id']}: " in str(stop.value) and "\n" not in str(stop.value)


def test_a_prompt_is_the_published_question_with_its_image_in_front(tmp_path, llava):
    _, reader = llava
    _, items = questions("science_qa", tmp_path)
    from doratune.evaluation.kinds import kind_of

    text = kind_of(items[0]).prompt(items[0])
    assert text == "Look.\nWhich?\nA. one\nB. two\nC. three\nAnswer with the option's letter from the given choices directly."
    ids = prompt_tokens(reader, text, items[0])
    assert ids.count(reader.mark) == 16 and reader.decode(ids[-30:]).endswith("directly. ASSISTANT:")
    assert prompt_tokens(reader, text, items[1]).count(reader.mark) == 0
    assert read_output("B", items[0]) == ("B", True)
