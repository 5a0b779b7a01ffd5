"""TVQA (Lei 2018), in VALUE's files: a question about a clip of a TV show with its subtitles, five answers to choose from.

    tvqa_train_release.jsonl, tvqa_val_release.jsonl     lines {qid, q, a0 … a4, answer_idx, vid_name, ts}
    tv_subtitles.jsonl                                   lines {vid_name, sub: [{text, start, end}]}
    videos/VID_NAME.mp4, or frames/VID_NAME/             as the owner of the videos gives them

The answer is the choice's name, a0 to a4. The test parts have no published answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...errors import UserError
from ..documents import entries, published_file, value_of
from . import Sight, VisualItem, VisualTask, first_there, span_of, text_of

SUFFIXES = (".mp4", ".webm", ".mkv", ".avi")


class ChoiceTask(VisualTask):
    """A question about a video with numbered choices."""

    scored = "exact"
    choices: int
    subtitles: str
    """Name of the file of subtitles."""

    def items(self, place: Path, split: str) -> list[VisualItem]:
        path = published_file(place, f"{self.name}_{split}*.jsonl", f"the questions of {self.shown_name}")
        spoken = subtitles_of(path.parent, self.subtitles)
        return [self._item(path, n, one, spoken) for n, one in enumerate(entries(path), 1)]

    @property
    def shown_name(self) -> str:
        return type(self).__name__

    def _item(self, path: Path, n: int, one: Mapping, spoken: Mapping[str, str]) -> VisualItem:
        where = f"{path}: item {n}"
        if "answer_idx" not in one:
            raise UserError(f"{where} has no answer_idx; a part without published answers cannot be used here")
        right = value_of(one, "answer_idx", int, where)
        if not 0 <= right < self.choices:
            raise UserError(f"{where}: answer_idx is {right}, expected 0 to {self.choices - 1}")
        choices = " ".join(f"a{k}: {text_of(one, f'a{k}', where)}" for k in range(self.choices))
        video = text_of(one, "vid_name", where)
        span = span_of(one.get("ts"))
        moment = f" at {span[0]:g}-{span[1]:g} s" if span else ""
        name = str(value_of(one, "qid", (int, str), where))
        question = f"{text_of(one, 'q', where)}{moment} {choices}"
        sights, context = (video_at(path.parent, video),), spoken.get(video, "")
        return VisualItem(self.name, name, sights, question, (f"a{right}",), where, context, 1 / self.choices)


def subtitles_of(folder: Path, name: str) -> dict[str, str]:
    """What is said in each video.

    Raises:
        UserError: no such file, or lines of another kind.
    """
    path = folder / name
    if not path.is_file():
        raise UserError(f"{folder} holds no {name}, what is said in the videos; an empty file of that name does without")
    if not path.stat().st_size:
        return {}
    spoken = {}
    for n, one in enumerate(entries(path), 1):
        where = f"{path}: line {n}"
        parts = value_of(one, "sub", list, where)
        texts = [part["text"].strip() for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
        spoken[text_of(one, "vid_name", where)] = " ".join(filter(None, texts))
    return spoken


def video_at(folder: Path, name: str, span: tuple[float, float] | None = None) -> Sight:
    """The video of that name: a folder of frames, or a file."""
    return Sight(first_there(folder, ("frames", "videos", "."), [name, *(f"{name}{suffix}" for suffix in SUFFIXES)]), True, span)


class TVQA(ChoiceTask):
    name = "tvqa"
    shown = "tvqa_train*.jsonl, tvqa_val*.jsonl, tv_subtitles.jsonl and videos/ or frames/"
    choices = 5
    subtitles = "tv_subtitles.jsonl"


TASKS = (TVQA(),)
