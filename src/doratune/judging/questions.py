"""MT-Bench's files: 80 questions of two turns, reference answers, the judge's prompts (Zheng et al. 2023, FastChat's llm_judge).

    question.jsonl                 question_id, category, turns
    reference_answer_gpt-4.jsonl   question_id, choices[0].turns
    judge_prompts.jsonl            name, type, system_prompt, prompt_template

From a folder, or fetched once into the cache from where FastChat publishes them. A folder of one's own questions does as well.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..data.files import read_examples
from ..data.published import download
from ..errors import UserError, listed
from ..support.absent import no_folder
from ..support.files import replacing
from ..support.models import cache_folder
from ..support.text import lines, read_text

PUBLISHED_AT = "https://raw.githubusercontent.com/lm-sys/FastChat/main/fastchat/llm_judge/data/"
FILES = {
    "question.jsonl": "mt_bench/question.jsonl",
    "reference_answer_gpt-4.jsonl": "mt_bench/reference_answer/gpt-4.jsonl",
    "judge_prompts.jsonl": "judge_prompts.jsonl",
}
LINES = {"question.jsonl": 80, "reference_answer_gpt-4.jsonl": 30, "judge_prompts.jsonl": 8}
"""Lines of the published files."""

TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip
"""Published temperature of the answers, by category."""
OTHER_TEMPERATURE = 0.7
"""Of a category that is not among them, and of a question that sets no `required_temperature`."""


@dataclass(frozen=True)
class Question:
    """One question: its turns, and the reference's answers to them where there is one."""

    number: int
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] | None = None
    temperature: float = OTHER_TEMPERATURE


@dataclass(frozen=True)
class JudgePrompt:
    """How a judge is asked."""

    name: str
    system: str
    template: str


@dataclass(frozen=True)
class Bench:
    """The questions in their order, and the judge's prompts by name."""

    questions: tuple[Question, ...]
    prompts: dict[str, JudgePrompt]


def load_bench(folder: str | Path | None = None, limit: int | None = None, base_url: str = PUBLISHED_AT) -> Bench:
    """MT-Bench of a folder; without one the published files.

    Args:
        limit: only the first so many questions of each category.

    Raises:
        UserError: a file that is missing, cannot be fetched, or is not what it should be.
    """
    place = Path(folder) if folder is not None else _published(base_url)
    if not place.is_dir():
        raise UserError(f"{place}: {no_folder(place)}; give one that holds {', '.join(FILES)}")
    references = _references(place / "reference_answer_gpt-4.jsonl")
    questions = _questions(place / "question.jsonl", references)
    return Bench(_first(questions, limit), _prompts(place / "judge_prompts.jsonl"))


def _published(base_url: str) -> Path:
    folder = cache_folder() / "data" / "mt_bench"
    for name, path in FILES.items():
        if not (folder / name).is_file():
            with replacing(folder / name) as temporary:
                download(base_url.rstrip("/") + "/" + path, temporary, f"mt_bench/{name}", folder / name)
                _check_download(temporary, name)
    return folder


def _check_download(path: Path, name: str) -> None:
    """Raise for a file that has not the lines of the published one: nothing of it then enters the cache."""
    try:
        count = sum(isinstance(json.loads(line), dict) for line in lines(read_text(path)) if line.strip())
    except ValueError:
        count = 0
    if count != LINES[name]:
        raise UserError(f"{name} as fetched has {count} lines of JSON, {LINES[name]} were published; nothing was kept")


def _first(questions: list[Question], limit: int | None) -> tuple[Question, ...]:
    seen: dict[str, int] = {}
    chosen = []
    for question in questions:
        seen[question.category] = seen.get(question.category, 0) + 1
        if limit is None or seen[question.category] <= limit:
            chosen.append(question)
    return tuple(chosen)


def _questions(path: Path, references: dict[int, tuple[str, ...]]) -> list[Question]:
    questions, numbers = [], set()
    for item in read_examples(path):
        number, category, turns = item.get("question_id"), item.get("category"), item.get("turns")
        if not isinstance(number, int) or isinstance(number, bool) or number in numbers:
            raise UserError(f"{item.where}: question_id is {number!r}; expected a whole number of its own")
        if not isinstance(category, str) or not category:
            raise UserError(f"{item.where}: category is {category!r}; expected a name such as math or writing")
        if not _texts(turns) or len(turns) > 2:
            raise UserError(f"{item.where} has no list of one or two texts under 'turns'")
        temperature = item.get("required_temperature", TEMPERATURES.get(category, OTHER_TEMPERATURE))
        if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature <= 10:
            raise UserError(f"{item.where}: required_temperature is {temperature!r}; expected a number of at least 0")
        numbers.add(number)
        reference = references.get(number)
        if reference is not None and len(reference) < len(turns):
            raise UserError(f"{path.parent}: question {number} has {len(turns)} turns, its reference {len(reference)}")
        questions.append(Question(number, category, tuple(turns), reference, float(temperature)))
    return questions


def _references(path: Path) -> dict[int, tuple[str, ...]]:
    if not path.is_file():
        return {}
    return {number: turns for number, turns, _ in answers_in(path)}


def answers_in(path: Path) -> list[tuple[int, tuple[str, ...], str]]:
    """(question_id, its turns, model_id) of each line in the published layout.

    Raises:
        UserError: a line that is not in it.
    """
    rows = []
    for item in read_examples(path):
        try:
            number, turns, model = item["question_id"], item["choices"][0]["turns"], item["model_id"]
        except (KeyError, IndexError, TypeError):
            number, turns, model = None, None, None
        if not isinstance(number, int) or not isinstance(model, str) or not _texts(turns, empty=True):
            raise UserError(f"{item.where} is no answer in MT-Bench's layout (question_id, model_id, choices[0].turns)")
        rows.append((number, tuple(turns), model))
    numbers = [number for number, _, _ in rows]
    if twice := sorted({number for number in numbers if numbers.count(number) > 1}):
        raise UserError(f"{path} answers question {listed(map(str, twice), 3)} twice; leave one of the lines out")
    return rows


def _texts(value, empty: bool = False) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(t, str) and (empty or t.strip()) for t in value)


def _prompts(path: Path) -> dict[str, JudgePrompt]:
    prompts = {}
    for item in read_examples(path):
        texts = [item.get(key) for key in ("name", "system_prompt", "prompt_template")]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{item.where} is no judge prompt (name, system_prompt, prompt_template)")
        prompts[texts[0]] = JudgePrompt(*texts)
    return prompts
