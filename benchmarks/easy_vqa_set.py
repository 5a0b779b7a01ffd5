"""The set easy-vqa (pip install easy-vqa) as the benchmarks of images read it: questions, answers, and the class of each image.

Its images are files of 64 × 64 pixels with one figure each, 4,000 to train on and 1,000 to test; a question has one word as its
answer. Cost: reading a JSON file.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import transformers

from doratune.errors import UserError

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


def data_folder() -> Path:
    """Where the package keeps its images and questions."""
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or not spec.origin:
        raise UserError("easy-vqa is not installed; run: pip install easy-vqa")
    return Path(spec.origin).parent / "data"


def questions_of(data: Path, split: str) -> list[tuple[str, str, int]]:
    """(question, answer, number of the image) of the set in a folder, `train` or `test`."""
    return json.loads((data / split / "questions.json").read_text(encoding="utf-8"))


def image_path(data: Path, split: str, image: int) -> str:
    return str(data / split / "images" / f"{image}.png")


def classes(questions: Iterable[tuple[str, str, int]]) -> dict[int, tuple[str, str]]:
    """Image → (shape, colour), as far as its questions tell both: an answer that names one, a yes to a question that does, or a no
    to one that denies it."""
    shapes: dict[int, set[str]] = {}
    colours: dict[int, set[str]] = {}
    for question, answer, image in questions:
        words = question.strip("?").split()
        said = [answer]
        if answer in ("yes", "no"):
            denies = bool({"no", "not"} & set(words))
            said = words if (answer == "yes") != denies else []
        for names, told in ((SHAPES, shapes), (COLOURS, colours)):
            told.setdefault(image, set()).update(word for word in said if word in names)
    both = [image for image in shapes if len(shapes[image]) == len(colours[image]) == 1]
    return {image: (*shapes[image], *colours[image]) for image in sorted(both)}


def words_of(texts: Sequence[str]) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of the words of these texts, with `<s>`, `<pad>`, `</s>`, `<unk>` and `<mask>` as tokens 0 to 4."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    inner = Tokenizer(models.WordLevel(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special))
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), special))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names)
