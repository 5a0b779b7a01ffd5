"""TVC (Lei 2020), in VALUE's files: a moment of a clip of a TV show with its subtitles, described.

    tvc_train_release.jsonl, tvc_val_release.jsonl     lines {clip_id, vid_name, ts, descs: [{desc, desc_id}]}
    tv_subtitles.jsonl                                 videos/ or frames/, as of TVQA (`tvqa.py`)

The test parts have no published descriptions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...errors import UserError
from ..documents import entries, published_file, value_of
from . import VisualItem, VisualTask, span_of, text_of
from .tvqa import subtitles_of, video_at


class MomentTask(VisualTask):
    """A part of a video to be described."""

    scored = "caption"
    subtitles: str

    def items(self, place: Path, split: str) -> list[VisualItem]:
        path = published_file(place, f"{self.name}_{split}*.jsonl", "the moments")
        spoken = subtitles_of(path.parent, self.subtitles)
        items = []
        for n, one in enumerate(entries(path), 1):
            where = f"{path}: item {n}"
            if not one.get("descs"):
                raise UserError(f"{where} has no descs; a part without published descriptions cannot be used here")
            descriptions = value_of(one, "descs", list, where)
            texts = [text_of(entry if isinstance(entry, Mapping) else {}, "desc", where) for entry in descriptions]
            video, name = text_of(one, "vid_name", where), str(value_of(one, "clip_id", (int, str), where))
            sight = video_at(path.parent, video, span_of(one.get("ts")))
            items.append(VisualItem(self.name, name, (sight,), "", tuple(texts), where, spoken.get(video, "")))
        return items


class TVC(MomentTask):
    name = "tvc"
    shown = "tvc_train*.jsonl, tvc_val*.jsonl, tv_subtitles.jsonl and videos/ or frames/"
    subtitles = "tv_subtitles.jsonl"


TASKS = (TVC(),)
