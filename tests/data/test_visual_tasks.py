"""Published files of image and video tasks as items, and a file of one's own; what does not fit is one line with its place."""

import pytest
from published_tasks import published, put, touch

from doratune.data.visual_tasks import load_visual_items, parsed, tasks
from doratune.errors import UserError


def test_published_files_become_items(tmp_path):
    seen = published(tmp_path)
    read = {name: load_visual_items(f"{name}:{tmp_path / name}", "val") for name in tasks()}
    assert read.keys() == seen.keys() == tasks().keys()
    assert {name: [sight.path for sight in items[0].sights] for name, items in read.items()} == seen
    assert [len(items) for items in read.values()] == [2 if name == "nlvr" else 1 for name in read]
    first = {name: items[0] for name, items in read.items()}
    assert first["vqa"].answers.count("cat") == 8 and first["vqa"].prompt == "vqa: What is it?"
    assert first["gqa"].answers == ("yes",) and [one.answers for one in read["nlvr"]] == [("false",), ("true",)]
    assert first["caption"].answers == ("A cat.", "One cat sits.") and first["caption"].prompt == "caption:"
    assert first["tvqa"].prompt.endswith("Who? at 1.5-9 s a0: choice 0 a1: choice 1 a2: choice 2 a3: choice 3 a4: choice 4")
    assert first["how2qa"].answers == ("a2",) and first["how2qa"].context == "Hello. Bye."
    assert first["tvqa"].sights[0].video and first["tvqa"].sights[0].span is None  # the question says the moment
    assert first["tvc"].sights[0].span == (2, 4.5) and first["yc2c"].sights[0].key.endswith("clip_1@2-4.5")
    assert {name: item.chance for name, item in first.items() if item.chance} == {"nlvr": 0.5, "tvqa": 0.2, "how2qa": 0.25}


def test_other_parts_and_copies(tmp_path):
    published(tmp_path)
    trained = load_visual_items(f"caption:{tmp_path / 'caption'}")
    assert [item.answers for item in trained] == [("A dog.",)]  # restval is trained on
    assert len(load_visual_items(f"nlvr:{tmp_path / 'nlvr'}:val[:1]")) == 1
    rows = [{"uid": "nlvr2_0", "sent": "Both.", "label": 1, "img0": "x-img0", "img1": "x-img1"}]
    put(tmp_path / "other" / "train.json", rows)
    item = load_visual_items(f"nlvr:{tmp_path / 'other'}")[0]
    assert item.answers == ("true",) and [sight.path.rpartition("/")[2] for sight in item.sights] == ["x-img0.png", "x-img1.png"]
    own = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "A cat."}]}
    put(tmp_path / "coco" / "annotations" / "captions_train2014.json", own)
    assert load_visual_items(f"caption:{tmp_path / 'coco'}")[0].sights[0].path.endswith("train2014/a.jpg")


def test_a_file_of_ones_own(tmp_path):
    path = put(tmp_path / "mine.json", [
        {"task": "vqa", "image": "a.png", "question": "What?", "answer": "circle"},
        {"task": "nlvr", "images": ["a.png", "b.png"], "question": "The same.", "answer": "true", "id": "pair"},
        {"task": "caption", "image": "a.png", "answers": ["a circle", "round"]},
        {"task": "tvqa", "video": "frames/1", "question": "What first?", "answer": "red", "context": "he says", "span": [0, 2]},
    ])  # fmt: skip
    items = load_visual_items(str(path))
    assert [item.task for item in items] == ["vqa", "nlvr", "caption", "tvqa"] and [item.name for item in items][1] == "pair"
    assert [len(item.sights) for item in items] == [1, 2, 1, 1] and items[3].sights[0].span == (0, 2)
    assert len(load_visual_items(f"{path}[:2]")) == 2 and [item.chance for item in items] == [0, 0.5, 0, 0]


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"task": "vqaa", "image": "a", "question": "q", "answer": "a"}, "task is 'vqaa'; expected one of .* did you mean 'vqa'"),
        ({"task": "vqa", "question": "q", "answer": "a"}, "item 2 has nothing to look at; give one of image"),
        ({"task": "vqa", "image": "a", "video": "b", "question": "q", "answer": "a"}, "item 2 has 'image', 'video'; give one"),
        (
            {"task": "nlvr", "images": ["a", "b", "c"], "question": "q", "answer": "a"},
            "has 3 images; a question is about one",
        ),
        ({"task": "vqa", "image": "a", "question": "q"}, "has no answer: give answer"),
        ({"task": "vqa", "image": "a", "question": "q", "answer": 3}, "has no answer: give answer"),
        ({"task": "vqa", "image": "a", "question": " ", "answer": "a"}, "has no text under 'question'"),
        ({"task": "tvqa", "video": "a", "question": "q", "answer": "a", "span": [4, 2]}, r"span is '\[4, 2\]'; expected seconds"),
        ({"task": "vqa", "image": {"x": 1}, "question": "q", "answer": "a"}, "expected the name of a file"),
    ],
)
def test_items_that_cannot_be_used(item, said, tmp_path):
    path = put(tmp_path / "mine.json", [{"task": "vqa", "image": "a", "question": "q", "answer": "a"}, item])
    with pytest.raises(UserError, match=said):
        load_visual_items(str(path))
    unusable: list[str] = []
    assert len(load_visual_items(str(path), unusable=unusable)) == 1 and len(unusable) == 1


def test_published_files_that_cannot_be_used(tmp_path):
    published(tmp_path)
    put(tmp_path / "hidden" / "test1.json", [{"identifier": "test1-1-0-0", "sentence": "x."}], lines=True)
    put(tmp_path / "silent" / "tvc_train_release.jsonl", [{"clip_id": 1, "vid_name": "v", "ts": [0, 1], "descs": []}], lines=True)
    for source, said in (
        (f"vqa:{tmp_path / 'vqa'}:test", "vqa has no published answers for test; give train or val"),
        (f"vqa:{tmp_path / 'vqa'}", r"holds no \*train2014_questions.json"),
        (f"nlvr:{tmp_path / 'hidden'}:test", "label is None, expected True or False"),
        (f"tvc:{tmp_path / 'silent'}", "holds no tv_subtitles.jsonl, what is said in the videos; an empty file"),
        (f"gqa:{tmp_path / 'nowhere'}", "nowhere is not there; give NAME:FOLDER"),
        (f"vqq:{tmp_path}", "no task is called 'vqq'; did you mean 'vqa'"),
        ("vqa", "names a task and no place; give vqa:FOLDER with"),
        (str(tmp_path), "is a folder; give NAME:FOLDER"),
    ):
        with pytest.raises(UserError, match=said):
            load_visual_items(source)
    touch(tmp_path / "silent" / "tv_subtitles.jsonl")
    with pytest.raises(UserError, match="has no descs; a part without published descriptions"):
        load_visual_items(f"tvc:{tmp_path / 'silent'}")


def test_a_source_is_parsed(tmp_path):
    task, place, split, first = parsed(f"gqa:{tmp_path}:test[:3]")
    assert (task.name, place, split, first) == ("gqa", tmp_path, "test", 3)
    assert parsed("mine.json")[0] is None
