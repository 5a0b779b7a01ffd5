"""Published benchmarks of questions about images, one file a benchmark: its files become items of a kind (`kinds/`), and
answer files in its published layouts become texts by question.

    answer_files.py  answer files that belong to their questions
    vqav2.py         VQAv2: ten answers, soft accuracy
    textvqa.py       TextVQA: ten answers, soft accuracy by its own normalization
    vizwiz.py        VizWiz: ten answers, soft accuracy
    gqa.py           GQA: one right phrase
    science_qa.py    ScienceQA: lettered options, with and without an image
    mmbench.py       MMBench: lettered options, circular
    pope.py          POPE: yes or no, in three sets

`NAME:PLACE` is such a task: `vqav2:data/vqav2` is the folder with the published files, under their published names. Nothing
is fetched. Files in this folder that hold `BENCHMARKS` are found by themselves. Source of the layouts: the benchmarks' own
downloads and the answer files of LLaVA's scripts.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from functools import cache
from pathlib import Path

from ...errors import UserError
from .answer_files import answer_texts


class Benchmark:
    """Subclasses declare and override.

    An item has `id`, `image` (None for a question without one) and what its kind asks for."""

    name: str
    shown: str
    """The files that its folder holds, for messages."""
    image_places: tuple[str, ...] = ("images",)
    """Folders of images below the benchmark's, beside that itself."""
    id_keys: tuple[str, ...] = ("question_id",)
    text_keys: tuple[str, ...] = ("text", "answer")
    """What answer files call a question and its answer; the first that an entry has counts."""

    def items(self, place: Path) -> list[dict]:
        """The items of a folder, or of a question file in it.

        Raises:
            UserError: a file that is missing, malformed, or without right answers.
        """
        raise NotImplementedError

    def answers(self, path: Path, items: list[dict]) -> list[str]:
        """The answers of a file, in the items' order.

        Raises:
            UserError: malformed, or the file of other questions.
        """
        return answer_texts(path, [item["id"] for item in items], self.id_keys, self.text_keys)


@cache
def benchmarks() -> dict[str, Benchmark]:
    """Every benchmark by its name."""
    modules = [importlib.import_module(f".{info.name}", __name__) for info in pkgutil.iter_modules(__path__)]
    return {one.name: one for module in modules for one in getattr(module, "BENCHMARKS", ())}


def benchmark_of(task: str) -> tuple[Benchmark, Path] | None:
    """(benchmark, place) of a task `NAME:PLACE`; None for any other task.

    Raises:
        UserError: a benchmark's name without a place, or a place that is not there.
    """
    name, _, place = task.partition(":")
    if name not in benchmarks():
        return None
    one = benchmarks()[name]
    if not place:
        raise UserError(f"task {name} is read from its published files; give {name}:FOLDER with {one.shown}")
    if not Path(place).exists():
        raise UserError(f"{place}: no such file or folder; {name}:FOLDER is the folder with {one.shown}")
    return one, Path(place)


def benchmark_items(task: str) -> tuple[str, list[dict]] | None:
    """(name, items) of a task `NAME:PLACE`; None for any other task."""
    place = benchmark_of(task)
    if place is None:
        return None
    one, path = place
    folder = path if path.is_dir() else path.parent
    places = [str(folder / inner) for inner in ("", *one.image_places)]
    items = [{"where": f"{task}: question {item['id']}", "image_folders": places} | item for item in one.items(path)]
    if not items:
        raise UserError(f"{path} holds no question; expected {one.shown}")
    twice = [name for name, count in Counter(item["id"] for item in items).items() if count > 1]
    if twice:
        raise UserError(f"{path} has the question {twice[0]} twice; copy the published file again")
    return one.name, items
