"""YouCook2's captions (Zhou 2018), in VALUE's files: as TVC (`tvc.py`).

yc2c_train_release.jsonl, yc2c_val_release.jsonl     yc2_subtitles.jsonl     videos/ or frames/
"""

from __future__ import annotations

from .tvc import MomentTask


class YC2C(MomentTask):
    name = "yc2c"
    shown = "yc2c_train*.jsonl, yc2c_val*.jsonl, yc2_subtitles.jsonl and videos/ or frames/"
    subtitles = "yc2_subtitles.jsonl"


TASKS = (YC2C(),)
