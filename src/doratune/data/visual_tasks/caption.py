"""Captions of COCO (Lin 2014, Chen 2015), in its own files or in the split that captions are usually scored on (Karpathy 2015).

    annotations/captions_train2014.json, captions_val2014.json     images {id, file_name}, annotations {image_id, caption}
    dataset_coco.json     images {filepath, filename, split, sentences {raw}}; `restval` is trained on too

Where dataset_coco.json lies, it counts. Images: train2014/, val2014/, also below images/.
"""

from __future__ import annotations

from pathlib import Path

from ...errors import UserError
from ..documents import entries, published_file, value_of
from . import Sight, VisualItem, VisualTask, first_there, text_of

PARTS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}


class Caption(VisualTask):
    name = "caption"
    shown = "dataset_coco.json, or annotations/captions_train2014.json and captions_val2014.json; train2014/ and val2014/"
    scored = "caption"

    def items(self, place: Path, split: str) -> list[VisualItem]:
        folder = place if place.is_dir() else place.parent
        usual = folder / "dataset_coco.json" if place.is_dir() else place
        if usual.is_file() and usual.name.startswith("dataset"):
            return self._of_usual_split(usual, split)
        inner = "annotations/" if (folder / "annotations").is_dir() else ""
        path = published_file(place, f"{inner}captions_{split}2014.json", "the captions of COCO")
        texts: dict[int, list[str]] = {}
        for n, one in enumerate(entries(path, "annotations"), 1):
            where = f"{path}: annotation {n}"
            texts.setdefault(value_of(one, "image_id", int, where), []).append(text_of(one, "caption", where))
        items = []
        for n, one in enumerate(entries(path, "images"), 1):
            where = f"{path}: image {n}"
            number, name = value_of(one, "id", int, where), text_of(one, "file_name", where)
            if number not in texts:
                raise UserError(f"{where} ({name}) has no caption; copy the published file again")
            items.append(self._item(folder, f"{split}2014", name, texts[number], where))
        return items

    def _of_usual_split(self, path: Path, split: str) -> list[VisualItem]:
        items = []
        for n, one in enumerate(entries(path, "images"), 1):
            where = f"{path}: image {n}"
            if one.get("split") in PARTS[split]:
                sentences = value_of(one, "sentences", list, where)
                texts = [text_of(sentence, "raw", where) for sentence in sentences]
                part = str(one.get("filepath") or "val2014")
                items.append(self._item(path.parent, part, text_of(one, "filename", where), texts, where))
        return items

    def _item(self, folder: Path, part: str, name: str, texts: list[str], where: str) -> VisualItem:
        sight = Sight(first_there(folder, (part, f"images/{part}", "images", "."), [name]))
        return VisualItem(self.name, name, (sight,), "", tuple(texts), where)


TASKS = (Caption(),)
