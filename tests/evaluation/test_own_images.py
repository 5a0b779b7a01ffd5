"""Items of one's own with images, in every form of training data: they are scored with their images, by both protocols."""

import base64
import json

import pytest
import torch
from pictures import FAMILIES, image_folder, model_folder, write_items

from doratune.cli.main import main
from doratune.data import DataSettings
from doratune.data.image_reader import ImageReader
from doratune.errors import UserError
from doratune.evaluation.evaluate import evaluate
from doratune.evaluation.images import sources
from doratune.evaluation.own_items import OwnTask
from doratune.evaluation.tasks import load_task

ASKED, NAMES = "Which colour?", ["red.png", "green.png", "blue.png", "white.png"]
ANSWER = {"from": "gpt", "value": "red"}, {"role": "assistant", "content": "red"}


def conversations(name, folder):
    return {"image": name, "conversations": [{"from": "human", "value": f"<image>\n{ASKED}"}, ANSWER[0]]}


def listed(name, folder):
    return {"images": [name], "conversations": [{"from": "human", "value": f"<image>\n{ASKED}"}, ANSWER[0]]}


def messages(name, folder):
    return {"messages": [{"role": "user", "content": f"<image>{ASKED}"}, ANSWER[1]], "images": [name]}


def parts(name, folder):
    content = [{"type": "image", "image": name}, {"type": "text", "text": ASKED}]
    return {"messages": [{"role": "user", "content": content}, ANSWER[1]]}


def inline(name, folder):
    data = base64.b64encode((folder / name).read_bytes()).decode()
    content = [{"type": "image_url", "image_url": f"data:image/png;base64,{data}"}, {"type": "text", "text": ASKED}]
    return {"messages": [{"role": "user", "content": content}, ANSWER[1]]}


FORMS = {form.__name__: form for form in (conversations, listed, messages, parts, inline)}


@pytest.fixture(scope="module", params=FAMILIES)
def seeing(request):
    """A model whose images matter to its tiny head, and its reader."""
    model, processor = FAMILIES[request.param]()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    return model, ImageReader(processor, request.param)


def theirs(model, reader, name, folder):
    """What the processor itself makes of the question."""
    from PIL import Image

    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ASKED}]}]
    text = reader.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return reader.processor(images=[[Image.open(folder / name)]], text=[text], return_tensors="pt")


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_what_the_processor_asks_for(form, seeing, tmp_path):
    model, reader = seeing
    folder = image_folder(tmp_path / "images")
    write_items(tmp_path / "mine.json", [FORMS[form](name, folder) for name in NAMES])
    task = load_task(str(tmp_path / "mine.json"), own=OwnTask(reading=DataSettings(images=str(folder))))
    assert [len(sources(item)) for item in task[1]] == [1] * 4
    results = {
        size: evaluate(model, reader, [task], ["generate"], batch_size=size, max_new_tokens=6, output=tmp_path / f"out{size}")
        for size in (1, 3)
    }
    assert len({(tmp_path / f"out{size}" / "mine.generate.jsonl").read_text() for size in results}) == 1
    records = list(map(json.loads, (tmp_path / "out1" / "mine.generate.jsonl").read_text().splitlines()))
    for name, record in zip(NAMES, records):
        inputs = theirs(model, reader, name, folder)
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=reader.stops, pad_token_id=0)
        text = reader.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert record["output"] == text and (form == "inline" or record["image"] == str(folder / name))


@pytest.mark.parametrize("form", FORMS)
def test_choices_are_scored_with_the_image(form, seeing, tmp_path):
    """Beside the answers' place in the text, nothing but the image tells the items apart."""
    model, reader = seeing
    folder = image_folder(tmp_path / "images", [(16, 16)] * 4)
    choice = {"choices": ["red", "blue"]}
    write_items(tmp_path / "mine.json", [FORMS[form](name, folder) | choice for name in (*NAMES, NAMES[0])])
    task = load_task(str(tmp_path / "mine.json"), own=OwnTask(reading=DataSettings(images=str(folder))))
    evaluate(model, reader, [task], ["likelihood"], batch_size=4, output=tmp_path / "out")
    lines = (tmp_path / "out" / "mine.likelihood.jsonl").read_text().splitlines()
    scores = [tuple(round(score, 4) for score in json.loads(line)["scores"].values()) for line in lines]
    assert scores[0] == scores[4] and len(set(scores)) == 4


def test_images_lie_beside_the_file_or_where_the_setting_says(tmp_path, capsys):
    """Also those of an image's question and answer; an item whose format shows no image is refused, and said in training."""
    folder = image_folder(tmp_path / "images")
    for place, reading in ((tmp_path, DataSettings(images=str(folder))), (folder, DataSettings())):
        for form in (messages, conversations):
            task = load_task(str(write_items(place / "own.json", [form(NAMES[0], folder)])), own=OwnTask(reading=reading))
            assert sources(task[1][0])[0].place == str(folder / NAMES[0])
        item = {"image": NAMES[0], "question": ASKED, "answer": "red"}
        task = load_task(str(write_items(place / "phrase.json", [item])), own=OwnTask(reading=reading))
        assert sources(task[1][0])[0].place == str(folder / NAMES[0])
    alone = {"image": NAMES[0], "instruction": ASKED, "output": "red"}
    with pytest.raises(UserError, match="item 1 has an image, which instruction data does not show"):
        load_task(str(write_items(folder / "alone.json", [alone])))
    assert main(["data", str(folder / "alone.json"), "--model", str(model_folder(tmp_path / "model"))]) == 0
    assert "item 1 has an image, which instruction data does not show" in capsys.readouterr().out
    words = ["--model", "nowhere", "--task", str(tmp_path / "own.json"), "--output", str(tmp_path / "o"), "--images", "no/folder"]
    assert main(["evaluate", *words]) == 2
    assert "images is 'no/folder', which is no folder" in capsys.readouterr().err
