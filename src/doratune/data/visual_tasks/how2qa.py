"""How2QA (Li 2020), in VALUE's files: as TVQA (`tvqa.py`), with four answers to choose from.

how2qa_train_release.jsonl, how2qa_val_release.jsonl     how2_subtitles.jsonl     videos/ or frames/
"""

from __future__ import annotations

from .tvqa import ChoiceTask


class How2QA(ChoiceTask):
    name = "how2qa"
    shown = "how2qa_train*.jsonl, how2qa_val*.jsonl, how2_subtitles.jsonl and videos/ or frames/"
    choices = 4
    subtitles = "how2_subtitles.jsonl"


TASKS = (How2QA(),)
