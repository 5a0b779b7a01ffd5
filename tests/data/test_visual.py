"""Conversations about images: which tokens are learned, where the images go, what a batch holds; what is wrong is one line."""

import base64
import json

import pytest
import torch
from pictures import FAMILIES, FURTHER, image_folder, llava_items, write_items
from PIL import Image

from doratune.data import DataSettings, encoder, load_items
from doratune.data.encode import IGNORED, encode_all
from doratune.data.image_batches import ImageTextCollator
from doratune.data.image_reader import ImageReader, load_reader
from doratune.errors import UserError


@pytest.fixture(scope="module", params=[*FAMILIES, *FURTHER])
def family(request):
    model, processor = (FAMILIES | FURTHER)[request.param]()
    return request.param, model, ImageReader(processor, request.param)


@pytest.fixture(scope="module")
def llava():
    return ImageReader(FAMILIES["llava"]()[1], "llava")


def rows_of(tmp_path, items, reader, unusable=None, max_length=512, too_long="cut", **settings):
    """(rows, report, items) of a data file with these items."""
    image_folder(tmp_path / "images")
    file = write_items(tmp_path / "train.json", items)
    reading = DataSettings(**{"images": str(tmp_path / "images")} | settings)
    checked, kind = load_items(str(file), settings=reading, unusable=unusable)
    rows, report = encode_all(checked, encoder(kind, reading), reader, max_length, too_long, unusable=unusable)
    return rows, report, kind


def learned(reader, row):
    """The learned parts of a row as text."""
    parts, before = [], False
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        if label != IGNORED:
            assert label == token
            parts = [*parts[:-1], [*parts[-1], token]] if before else [*parts, [token]]
        before = label != IGNORED
    return [reader.tokenizer.decode(part) for part in parts]


def test_the_loss_is_on_the_answers_and_on_what_closes_them(tmp_path, family):
    name, _, reader = family
    turns = [("human", "<image>\nWhat colour is it?"), ("gpt", "red"), ("human", "And <image>?"), ("gpt", "no green")]
    item = {"image": ["red.png", "green.png"], "conversations": [{"from": f, "value": v} for f, v in turns]}
    rows, _, kind = rows_of(tmp_path, [item, *llava_items(4)], reader)
    assert kind.name == "visual"
    closing = {"smolvlm": "<end_of_utterance>", "gemma3": "<end_of_turn>"}.get(name, "</s>")
    assert [part.strip() for part in learned(reader, rows[0])] == [f"red{closing}", f"no green{closing}"]
    assert [part.strip() for part in learned(reader, rows[4])] == [f"yes{closing}"]
    mark = reader.mark
    for row in rows:
        assert all(label == IGNORED for token, label in zip(row["input_ids"], row["labels"]) if token == mark)
        assert row["length"] == len(row["input_ids"]) == len(row["labels"])
        assert row["input_ids"][0] == reader.bos_token_id


def test_the_tokens_are_those_of_the_processor_itself(tmp_path, family):
    """For images of every size, one or several, also none."""
    _, _, reader = family
    sizes = [(16, 16), (7, 40), (64, 9), (33, 31)]
    image_folder(tmp_path / "images", sizes)
    names = ["red.png", "green.png", "blue.png", "white.png"]
    for images in ([], names[:1], names[1:2], names[2:], names):
        turns = [{"role": "user", "content": "<image>" * len(images) + "yes?"}, {"role": "assistant", "content": "no"}]
        rows, _, _ = rows_of_sizes(tmp_path, {"messages": turns, "images": images}, reader)
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": "yes?"}]
        parts = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": "no"}]}]
        text = reader.processor.apply_chat_template(parts, tokenize=False)
        text = text.replace("no ", "no</s> ") if reader.name.startswith("llava") else text
        opened = [[Image.open(tmp_path / "images" / name) for name in images]] if images else None
        theirs = reader.processor(text=[text], images=opened)["input_ids"][0]
        assert rows[0]["input_ids"] == list(theirs)


def rows_of_sizes(tmp_path, item, reader):
    reading = DataSettings(images=str(tmp_path / "images"), data_format="visual")
    items, kind = load_items(str(write_items(tmp_path / "one.json", [item])), settings=reading)
    return *encode_all(items, encoder(kind, reading), reader, 512), kind


def test_a_batch_is_what_its_rows_are_alone(tmp_path, family):
    """Loss and logits of a mixed batch are those of each row by itself; images of rows in their order."""
    _, model, reader = family
    rows, _, _ = rows_of(tmp_path, llava_items(8), reader)
    collate = ImageTextCollator(reader, model)
    with torch.no_grad():
        together = collate(rows)
        logits = model(**together).logits
        for i, row in enumerate(rows):
            alone = model(**collate([row]))
            count = sum(label != IGNORED for label in row["labels"])
            assert torch.allclose(logits[i, -count - 1 :], alone.logits[0, -count - 1 :], atol=1e-5)
    assert together["attention_mask"].sum().item() == sum(row["length"] for row in rows)
    assert "pixel_values" in together and "pixel_values" not in collate([rows[3]])


def test_other_pixels_give_other_logits(tmp_path, family):
    """The images reach the model: the same words about another picture are another distribution."""
    _, model, reader = family
    rows, _, _ = rows_of(tmp_path, llava_items(2), reader)
    same = {"input_ids": rows[0]["input_ids"], "labels": rows[0]["labels"], "length": rows[0]["length"]}
    collate = ImageTextCollator(reader, model)
    Image.new("RGB", (16, 16), (0, 250, 0)).save(tmp_path / "images" / "other.png")
    other = encode_other(tmp_path, reader)
    with torch.no_grad():
        a, b = (model(**collate([same | {"images": images}])).logits for images in (rows[0]["images"], other))
    assert not torch.allclose(a, b, atol=1e-4)


def encode_other(tmp_path, reader):
    item = llava_items(1)[0] | {"image": "other.png"}
    return rows_of_sizes(tmp_path, item, reader)[0][0]["images"]


def test_every_form_of_naming_images_gives_the_same_row(tmp_path, llava):
    folder = image_folder(tmp_path / "images")
    data = base64.b64encode((folder / "red.png").read_bytes()).decode()
    ask, say = "What colour is it?", {"role": "assistant", "content": "red"}
    text = {"type": "text", "text": ask}
    forms = [
        {"image": "red.png", "conversations": [{"from": "human", "value": f"<image>\n{ask}"}, {"from": "gpt", "value": "red"}]},
        {"images": ["red.png"], "conversations": [{"from": "human", "value": f"{ask}\n<image>"}, {"from": "gpt", "value": "red"}]},
        {"images": ["red.png"], "messages": [{"role": "user", "content": f"<image>{ask}"}, say]},
        {"image": str(folder / "red.png"), "messages": [{"role": "user", "content": f"<image>{ask}"}, say]},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "red.png"}, text]}, say]},
        {"messages": [{"role": "user", "content": [{"type": "image", "path": "red.png"}, text]}, say]},
        {"messages": [{"role": "user", "content": [{"type": "image"}, text]}, say], "images": ["red.png"]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "red.png"}}, text]}, say]},
        {"messages": [{"role": "user", "content": f"<image>{ask}"}, say], "images": [{"path": "red.png", "bytes": None}]},
        {"messages": [{"role": "user", "content": f"<image>{ask}"}, say], "images": [f"data:image/png;base64,{data}"]},
        {"messages": json.dumps([{"role": "user", "content": f"<image>{ask}"}, say]), "images": ["red.png"]},
    ]
    rows, _, kind = rows_of(tmp_path, forms, llava)
    assert kind.name == "visual" and len(rows) == len(forms)
    for row in rows:
        assert row["input_ids"] == rows[0]["input_ids"] and row["labels"] == rows[0]["labels"]


def test_images_lie_beside_the_data_file_unless_a_folder_is_set(tmp_path, llava):
    image_folder(tmp_path)
    reading = DataSettings()
    items, kind = load_items(str(write_items(tmp_path / "x.json", llava_items(1))), settings=reading)
    rows, _ = encode_all(items, encoder(kind, reading), llava, 512)
    assert rows[0]["images"][0].place == str(tmp_path / "red.png")
    missing = DataSettings(images=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="which is no folder"):
        encode_all(items, encoder(kind, missing), llava, 512)


def ask(value, image=None, **more):
    item = {"conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "red"}]}
    return item | ({} if image is None else {"image": image}) | more


WRONG = {
    "a mark too many": (ask("<image><image>what?", "red.png"), "has 2 <image> marks and 1 images"),
    "a mark too few": (ask("what?", "red.png"), "has 0 <image> marks and 1 images"),
    "two images, one mark": (ask("<image>what?", ["red.png", "blue.png"]), "has 1 <image> marks and 2 images"),
    "a mark without images": (ask("<image>what?", []), "has 1 <image> marks and 0 images"),
    "a missing file": (ask("<image>what?", "nobody.png"), "nobody.png: no such image file"),
    "a folder": (ask("<image>what?", "."), "a folder, expected an image file"),
    "no image": (ask("<image>what?", "text.png"), "text.png: no JPEG"),
    "truncated": (ask("<image>what?", "cut.png"), "cut.png: a truncated or damaged image"),
    "empty": (ask("<image>what?", "empty.png"), "empty.png: an empty file"),
    "a number": (ask("<image>what?", 7), "the image is a whole number"),
    "to be fetched": (ask("<image>what?", "http://example.org/a.png"), "would have to be fetched"),
    "no Base64": (ask("<image>what?", "data:image/png;base64,???"), "no data in Base64"),
    "both keys": (ask("<image>what?", "red.png", images=["red.png"]), "has images under 'image', 'images'"),
    "a video": (ask("<image>what?", "red.png", videos=["a.mp4"]), "has a video"),
    "in the answer": (
        {"image": "red.png", "conversations": [{"from": "human", "value": "draw"}, {"from": "gpt", "value": "<image>"}]},
        "has an <image> in an answer",
    ),
    "a special token": (ask("<image>what</s>?", "red.png"), "holds the special token '</s>'"),
    "no turns": ({"image": "red.png", "conversations": []}, "has no list of"),
}


def spoil(folder):
    (folder / "text.png").write_text("no image at all")
    (folder / "empty.png").write_bytes(b"")
    Image.effect_noise((64, 64), 50).save(folder / "noise.png")
    (folder / "cut.png").write_bytes((folder / "noise.png").read_bytes()[:900])


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_one_line_with_item_and_path(tmp_path, llava, wrong):
    item, words = WRONG[wrong]
    spoil(image_folder(tmp_path / "images"))
    with pytest.raises(UserError) as stop:
        rows_of(tmp_path, [*llava_items(2), item], llava)
    message = str(stop.value)
    assert words in message and "item 3" in message and "train.json" in message and "\n" not in message, message
    unusable = []
    rows, report, _ = rows_of(tmp_path, [*llava_items(2), item], llava, unusable=unusable)
    assert len(rows) == 2 and report.counts()["unusable"] == 1 and words in unusable[0]


def test_broken_modes_are_read_as_any_other(tmp_path, llava):
    """RGBA, grey, CMYK and camera-turned files are images of their upright size."""
    folder = image_folder(tmp_path / "images")
    picture = Image.new("RGB", (12, 20), (200, 10, 10))
    for mode, name in (("RGBA", "a.png"), ("L", "b.png"), ("P", "c.png"), ("CMYK", "d.jpg"), ("1", "e.png")):
        picture.convert(mode).save(folder / name)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "f.jpg", exif=exif)
    rows, report, _ = rows_of(
        tmp_path, [ask("<image>what?", f"{n}") for n in ("a.png", "b.png", "c.png", "d.jpg", "e.png", "f.jpg")], llava
    )
    assert len(rows) == 6 and not report.unusable


def test_images_count_at_their_token_cost_and_are_never_cut(tmp_path, family):
    _, _, reader = family
    long = ask("<image>" + "what colour " * 20, "red.png")
    rows, report, _ = rows_of(tmp_path, [long], reader)
    whole, cost = rows[0]["length"], len(reader.expansion((16, 16)))
    marks = sum(token == reader.mark for token in rows[0]["input_ids"])
    assert whole > cost and marks >= 1
    rows, report, _ = rows_of(tmp_path, [long], reader, max_length=whole - 15)
    assert report.counts()["cut"] == 1 and rows[0]["length"] == whole - 15
    assert sum(token == reader.mark for token in rows[0]["input_ids"]) == marks
    assert learned(reader, rows[0])[0].strip().startswith("red")
    with pytest.raises(UserError, match="longer than max_length"):
        rows_of(tmp_path, [long], reader, max_length=cost + 3)
    with pytest.raises(UserError, match="longer than max_length"):
        rows_of(tmp_path, [long], reader, max_length=whole - 1, too_long="skip")


def test_what_is_shown_counts_an_images_tokens(tmp_path, llava, capsys):
    """Through `doratune data`: the tokens of an image are one word and a number; what is wrong is listed with its item."""
    from doratune.cli.main import main

    llava.save_pretrained(tmp_path / "model")
    FAMILIES["llava"]()[0].save_pretrained(tmp_path / "model")
    image_folder(tmp_path / "images")
    write_items(tmp_path / "train.json", [*llava_items(2), ask("<image>what?", "nobody.png")])
    options = ["--model", tmp_path / "model", "--images", tmp_path / "images"]
    assert main(["data", str(tmp_path / "train.json"), *map(str, options)]) == 1
    shown = capsys.readouterr().out
    assert "USER: <image> × 16 \nWhat colour is it? ASSISTANT:⟦ red</s>⟧" in shown
    assert "item 3: " in shown and "nobody.png: no such image file" in shown


def test_a_mix_that_begins_with_text_is_read_with_its_images(tmp_path, llava):
    items = [llava_items(4)[3], *llava_items(3)]
    rows, _, kind = rows_of(tmp_path, items, llava)
    assert kind.name == "visual" and [bool(row.get("images")) for row in rows] == [False, True, True, True]


def test_other_formats_train_a_model_of_images_too(tmp_path, family):
    _, _, reader = family
    for items, name in (
        ([{"instruction": "Say red", "output": "red"}], "instruction"),
        ([{"prompt": "red? ", "completion": "yes"}], "completion"),
        ([{"messages": [{"role": "user", "content": "red?"}, {"role": "assistant", "content": "yes"}]}], "chat"),
    ):
        rows, _, kind = rows_of(tmp_path, items, reader)
        assert kind.name == name and "images" not in rows[0] and learned(reader, rows[0])


def test_a_model_of_text_refuses_images(tmp_path, tiny_tokenizer):
    with pytest.raises(UserError, match="reads text alone; take a model of images and text"):
        rows_of(tmp_path, llava_items(1), tiny_tokenizer)
    with pytest.raises(UserError, match="set data_format: visual"):
        rows_of(tmp_path, llava_items(1), tiny_tokenizer, data_format="sharegpt")


def test_which_reader_a_folder_gets(tmp_path, tiny_folder, family):
    name, model, reader = family
    model.save_pretrained(tmp_path / "m")
    reader.save_pretrained(tmp_path / "m")
    assert isinstance(load_reader(str(tmp_path / "m")), ImageReader)
    assert not isinstance(load_reader(str(tiny_folder)), ImageReader)
    for path in (tmp_path / "m").glob("*processor*"):
        path.unlink()
    with pytest.raises(UserError):
        load_reader(str(tmp_path / "m"))


def test_real_photographs(shared_data):
    """The demonstration set of LLaMA-Factory: messages with marks and JPEG files."""
    reader = ImageReader(FAMILIES["llava"]()[1], "llava")
    folder = shared_data / "multimodal"
    reading = DataSettings(images=str(folder))
    unusable = []
    items, kind = load_items(str(folder / "mllm_demo.json"), settings=reading, unusable=unusable)
    rows, report = encode_all(items, encoder(kind, reading), reader, 4096, unusable=unusable)
    assert kind.name == "visual" and len(rows) == 6 and all(row["images"] for row in rows)
    with pytest.raises(UserError, match="has a video"):
        load_items(str(folder / "mllm_video_demo.json"), settings=DataSettings(data_format="visual"))
