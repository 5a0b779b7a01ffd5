"""A model's answers to both turns of MT-Bench, in FastChat's layout, each batch of questions kept when it is done.

    {"question_id": 81, "answer_id": …, "model_id": …, "choices": [{"index": 0, "turns": […, …]}], "tstamp": …}

Questions of one temperature share batches, in the questions' order, so that a run that was stopped goes on with the batches that it
would have had, from the same seeds. Cost: two generations a question.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..data.instruction import prompt_of
from ..errors import UserError
from ..generation.prompts import rendered
from ..generation.sampling import Sampling, answers
from .ledger import append, whole_lines
from .questions import Bench, Question, answers_in

TEMPLATES = ("auto", "chat", "instruction")


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are written: 1,024 new tokens as published.

    Args:
        template: chat (the tokenizer's), instruction (the prompt of instruction data), auto (chat where there is a template).
    """

    template: str = "auto"
    max_new_tokens: int = 1024
    seed: int = 0
    batch_size: int = 32


def write_answers(
    model,
    tokenizer,
    bench: Bench,
    path: Path,
    model_id: str,
    settings: AnswerSettings,
    done: Callable[[int], None] = lambda n: None,
) -> None:
    """Answer every question that `path` has no answer to, and put the answers there.

    Raises:
        UserError: a question that does not fit into the model; a file that holds another model's answers.
    """
    there = set(read_answers(path, model_id))
    template = settings.template if settings.template != "auto" else ("chat" if tokenizer.chat_template else "instruction")
    for batch in batches(bench.questions, settings.batch_size):
        missing = [question for question in batch if question.number not in there]
        if missing:
            seed = settings.seed + batch[0].number
            sampling = Sampling(missing[0].temperature, 1.0, settings.max_new_tokens, seed)
            for question, turns in zip(missing, both_turns(model, tokenizer, missing, template, sampling), strict=True):
                append(path, json.dumps(layout(question, model_id, turns), ensure_ascii=False))
        done(len(batch))


def batches(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Questions of one temperature, at most `size` of them."""
    for temperature in dict.fromkeys(question.temperature for question in questions):
        alike = [question for question in questions if question.temperature == temperature]
        yield from (alike[i : i + size] for i in range(0, len(alike), size))


def both_turns(model, tokenizer, questions: Sequence[Question], template: str, sampling: Sampling) -> list[list[str]]:
    """The answers to all turns of each question; the second turn reads the first answer."""
    turns: list[list[str]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        places = [i for i, question in enumerate(questions) if len(question.turns) > turn]
        prompts = [conversation_ids(tokenizer, questions[i].turns[: turn + 1], turns[i], template) for i in places]
        fitting = replace(sampling, max_new_tokens=room(model, [questions[i] for i in places], prompts, turn, sampling))
        for i, answer in zip(places, answers(model, tokenizer, prompts, fitting, len(places)), strict=True):
            turns[i].append(answer.text.strip())
    return turns


def room(model, questions: Sequence[Question], prompts: Sequence[Sequence[int]], turn: int, sampling: Sampling) -> int:
    """New tokens that all of these prompts have room for.

    Raises:
        UserError: one has room for none.
    """
    most = getattr(model.config, "max_position_embeddings", None)
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    if most is None or len(prompts[longest]) + sampling.max_new_tokens <= most:
        return sampling.max_new_tokens
    if len(prompts[longest]) >= most:
        where, length = f"turn {turn + 1} of question {questions[longest].number}", len(prompts[longest])
        raise UserError(
            f"{where} has {length} tokens, the model {most} positions; lower --max_new_tokens, or leave the question out"
        )
    return most - len(prompts[longest])


def conversation_ids(tokenizer, asked: Sequence[str], answered: Sequence[str], template: str) -> list[int]:
    """Token ids of the turns so far, ready for the next answer."""
    if template == "chat":
        messages = [{"role": "user", "content": asked[0]}]
        for answer, question in zip(answered, asked[1:], strict=True):
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
        return rendered({"messages": messages}, tokenizer, "chat")
    text = prompt_of({"instruction": asked[0]})
    for answer, question in zip(answered, asked[1:], strict=True):
        text += f"{answer}\n\n### Instruction:\n{question}\n\n### Response:\n"
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def layout(question: Question, model_id: str, turns: Sequence[str]) -> dict:
    """One line of the published answer files."""
    digest = hashlib.sha256(json.dumps([question.number, model_id, *turns]).encode()).hexdigest()[:22]
    choices = [{"index": 0, "turns": list(turns)}]
    return {"question_id": question.number, "answer_id": digest, "model_id": model_id, "choices": choices, "tstamp": time.time()}


def read_answers(path: Path, model_id: str | None = None) -> dict[int, tuple[str, ...]]:
    """{question: its answers} of a file in the published layout; empty where there is no file.

    Raises:
        UserError: a line that is no answer, or answers of another model than `model_id`.
    """
    if not path.is_file() or not whole_lines(path):
        return {}
    rows = answers_in(path)
    other = sorted({model for _, _, model in rows} - {model_id or rows[0][2]})
    if other:
        raise UserError(f"{path} holds answers of {other[0]}, not only of {model_id or rows[0][2]}; give a file of one model")
    return {number: turns for number, turns, _ in rows}


def model_of(path: Path) -> str:
    """The model whose answers a file holds.

    Raises:
        UserError: no such file, or nothing in it.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file of answers")
    return answers_in(path)[0][2]
