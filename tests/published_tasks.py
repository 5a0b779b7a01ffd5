"""A folder of each image and video task with files as published: one or two items each, images and videos of no bytes."""

import json


def put(path, value, lines=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in value) if lines else json.dumps(value))
    return path


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return str(path)


def published(folder):
    """A folder of each task with its published names, and the paths of what they look at."""
    seen = {}
    put(folder / "vqa" / "v2_OpenEnded_mscoco_val2014_questions.json", {"data_subtype": "val2014", "questions": [
        {"question_id": 7, "image_id": 42, "question": "What is it?"}]})  # fmt: skip
    people = [{"answer": "cat", "answer_id": i} for i in range(8)] + [{"answer": "dog"}] * 2
    put(folder / "vqa" / "v2_mscoco_val2014_annotations.json", {"annotations": [{"question_id": 7, "answers": people}]})
    seen["vqa"] = [touch(folder / "vqa" / "val2014" / "COCO_val2014_000000000042.jpg")]
    put(folder / "gqa" / "val_balanced_questions.json", {"q1": {"imageId": "9", "question": "Is it red?", "answer": "yes"}})
    seen["gqa"] = [touch(folder / "gqa" / "images" / "9.jpg")]
    put(folder / "nlvr" / "dev.json", [
        {"identifier": "dev-1-2-0", "sentence": "Both are dogs.", "label": "False"},
        {"identifier": "dev-1-2-1", "sentence": "One is a cat.", "label": "True"}], lines=True)  # fmt: skip
    seen["nlvr"] = [touch(folder / "nlvr" / "images" / "dev" / f"dev-1-2-img{k}.png") for k in (0, 1)]
    put(folder / "caption" / "dataset_coco.json", {"images": [
        {"filename": "a.jpg", "filepath": "val2014", "split": "val", "sentences": [{"raw": "A cat."}, {"raw": "One cat sits."}]},
        {"filename": "b.jpg", "filepath": "train2014", "split": "restval", "sentences": [{"raw": "A dog."}]}]})  # fmt: skip
    seen["caption"] = [touch(folder / "caption" / "images" / "val2014" / "a.jpg")]
    spoken = [{"vid_name": "clip_1", "sub": [{"text": " Hello. ", "start": 0, "end": 1}, {"text": "Bye."}]}]
    for name, subtitles, choices in (("tvqa", "tv", 5), ("how2qa", "how2", 4)):
        one = {"qid": 3, "q": "Who?", "answer_idx": 2, "vid_name": "clip_1", "ts": "1.5-9.0"} | {
            f"a{k}": f"choice {k}" for k in range(choices)
        }
        put(folder / name / f"{name}_val_release.jsonl", [one], lines=True)
        put(folder / name / f"{subtitles}_subtitles.jsonl", spoken, lines=True)
        seen[name] = [touch(folder / name / "videos" / "clip_1.mp4")]
    for name, subtitles in (("tvc", "tv"), ("yc2c", "yc2")):
        one = {
            "clip_id": 5,
            "vid_name": "clip_1",
            "ts": [2, 4.5],
            "descs": [{"desc": "He waves.", "desc_id": 1}, {"desc": "A man."}],
        }
        put(folder / name / f"{name}_val_release.jsonl", [one], lines=True)
        put(folder / name / f"{subtitles}_subtitles.jsonl", spoken, lines=True)
        (folder / name / "frames" / "clip_1").mkdir(parents=True)
        seen[name] = [str(folder / name / "frames" / "clip_1")]
    return seen
