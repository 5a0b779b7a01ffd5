"""NLVR2 (Suhr 2019): a sentence about two images, true or false.

    train.json, dev.json, test1.json     lines {identifier, sentence, label, directory}
    images/train/DIRECTORY/, dev/, test1/     IDENTIFIER without its last number, and -img0.png, -img1.png

Some copies hold lists of {uid, sent, label: 0 or 1, img0, img1}: read as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...errors import UserError
from ..documents import published_file
from ..files import read_examples
from . import Sight, VisualItem, VisualTask, first_there, text_of

PARTS = {"train": "train", "val": "dev", "test": "test1"}
CHANCE = 0.5
LABELS = {"true": "true", "false": "false", "1": "true", "0": "false"}


class NLVR(VisualTask):
    name = "nlvr"
    shown = "train.json, dev.json, test1.json and images/"
    scored = "exact"

    def items(self, place: Path, split: str) -> list[VisualItem]:
        part = PARTS[split]
        path = published_file(place, f"{part}.json", "the sentences of NLVR2")
        items = []
        for one in read_examples(path):
            where = one.where
            label = LABELS.get(str(one.get("label")).lower())
            if label is None:
                raise UserError(f"{where}: label is {one.get('label')!r}, expected True or False; hidden parts cannot be used here")
            name = text_of(one, "identifier" if "identifier" in one else "uid", where)
            sights = tuple(Sight(_image(path.parent, part, one, name, k)) for k in (0, 1))
            sentence = text_of(one, "sentence" if "sentence" in one else "sent", where)
            items.append(VisualItem(self.name, name, sights, sentence, (label,), where, chance=CHANCE))
        return items


def _image(folder: Path, part: str, one: Mapping, name: str, k: int) -> str:
    """Where the left (0) or right (1) image lies."""
    named = one.get(f"img{k}")
    file = named if isinstance(named, str) else f"{name.rpartition('-')[0]}-img{k}"
    file = file if file.endswith(".png") else f"{file}.png"
    names = [f"{one['directory']}/{file}", file] if "directory" in one else [file]
    return first_there(folder, (f"images/{part}", part, "images", "."), names)


TASKS = (NLVR(),)
