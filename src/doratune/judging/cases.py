"""What the judge is asked: MT-Bench's prompts for one answer, and for two answers in both orders.

Math, reasoning and coding are judged beside the reference answer; a question of theirs without one is judged by the general prompt,
and named. The second turn is judged within its whole conversation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import UserError, listed
from .questions import Bench, JudgePrompt, Question

WITH_REFERENCE = ("math", "reasoning", "coding")
Answers = Mapping[int, Sequence[str]]
"""Question number → the answers to its turns."""


@dataclass(frozen=True)
class Case:
    """One call: a question's turn, who answered (first and second, for pairs), and the judge's prompt."""

    question: Question
    turn: int
    models: tuple[str, ...]
    prompt: JudgePrompt
    text: str

    @property
    def key(self) -> tuple[str, str]:
        """What the judge reads: the same key is the same call."""
        return self.prompt.name, self.text


def single_cases(bench: Bench, model: str, answers: Answers) -> list[Case]:
    """One case a question and turn.

    Raises:
        UserError: a question without an answer; a judge prompt that is missing or asks for what there is not.
    """
    check_complete(bench, model, answers)
    cases = []
    for question in bench.questions:
        for turn in range(len(question.turns)):
            prompt = _prompt(bench, "single", question, turn)
            fields = _fields(question, turn) | (
                {"answer": answers[question.number][0]} if turn == 0 else _numbered("answer", answers[question.number])
            )
            cases.append(Case(question, turn + 1, (model,), prompt, _filled(prompt, fields)))
    return cases


def pair_cases(bench: Bench, first: tuple[str, Answers], second: tuple[str, Answers]) -> list[Case]:
    """Two cases a question and turn: the second has the models the other way round, against a judge's liking for a place.

    Args:
        first, second: (model, its answers).
    """
    for model, answers in (first, second):
        check_complete(bench, model, answers)
    cases = []
    for question in bench.questions:
        for turn in range(len(question.turns)):
            prompt = _prompt(bench, "pair", question, turn)
            for (a, a_answers), (b, b_answers) in ((first, second), (second, first)):
                fields, one, two = _fields(question, turn), a_answers[question.number], b_answers[question.number]
                if turn == 0:
                    fields |= {"answer_a": one[0], "answer_b": two[0]}
                else:
                    fields |= _numbered("answer_a", one) | _numbered("answer_b", two)
                cases.append(Case(question, turn + 1, (a, b), prompt, _filled(prompt, fields)))
    return cases


def without_reference(bench: Bench) -> list[int]:
    """Numbers of the questions that are meant to be judged beside a reference and have none."""
    return [q.number for q in bench.questions if q.category in WITH_REFERENCE and q.reference is None]


def check_complete(bench: Bench, model: str, answers: Answers) -> None:
    """Raise for a question whose turns a model has not all answered."""
    missing = [str(q.number) for q in bench.questions if len(answers.get(q.number, ())) < len(q.turns)]
    if missing:
        raise UserError(f"{model} has not answered question {listed(missing, 5)} in all turns; write the answers first")


def _prompt(bench: Bench, way: str, question: Question, turn: int) -> JudgePrompt:
    general, special = {"single": ("single-v1", "single-math-v1"), "pair": ("pair-v2", "pair-math-v1")}[way]
    beside = question.category in WITH_REFERENCE and question.reference is not None
    name = (special if beside else general) + ("-multi-turn" if turn else "")
    if name not in bench.prompts:
        raise UserError(f"judge_prompts.jsonl has no prompt {name!r}; it has {listed(bench.prompts, 10)}")
    return bench.prompts[name]


def _fields(question: Question, turn: int) -> dict[str, str]:
    fields = {"question": question.turns[0]} if turn == 0 else _numbered("question", question.turns)
    return fields | _numbered("ref_answer", question.reference or ())


def _numbered(name: str, texts: Sequence[str]) -> dict[str, str]:
    return {f"{name}_{i}": text for i, text in enumerate(texts, 1)}


def _filled(prompt: JudgePrompt, fields: dict[str, str]) -> str:
    try:
        return prompt.template.format(**fields)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"judge prompt {prompt.name} asks for {error}, which there is not; take the published prompts") from None
