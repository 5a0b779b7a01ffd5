"""Questions with worked answers: `question`, `answer`, in the prompt of the published Orca-Math runs (§6.1), to the space.

    ###Question:
    {question}
    ###Answer:
    {answer}

One prompt serves training and evaluation; prompt and answer are tokenized apart. Under prompt: template they are a user turn and
its answer.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import UserError
from .. import chat
from ..encode import Encoded
from ..words import check_words
from . import DataFormat


def prompt_of(item: Mapping) -> str:
    """The text in front of the answer."""
    return f"###Question:\n{item['question']}\n###Answer:\n"


class Questions(DataFormat):
    name, rank = "questions", 46
    shown = "question, answer"
    keys = (("question", "answer"),)
    usual = {"question": ("problem", "query"), "answer": ("solution", "response")}

    def check(self, item: Mapping, where: str, settings) -> None:
        for key in ("question", "answer"):
            if not isinstance(item.get(key), str) or not item[key].strip():
                raise UserError(f"{where} has no text under {key!r}; every item needs question and answer")

    def encode(self, item: Mapping, tokenizer, settings) -> Encoded:
        """The answer is closed by the end-of-sequence token."""
        if settings.prompt == "template":
            turns = [{"role": "user", "content": item["question"]}, {"role": "assistant", "content": item["answer"]}]
            return chat.encode(turns, tokenizer, settings)
        if settings.special_tokens == "refuse":
            check_words(((name, item[name]) for name in ("question", "answer")), tokenizer)
        prompt = tokenizer(prompt_of(item))["input_ids"]
        if prompt and prompt[-1] == tokenizer.eos_token_id:
            prompt = prompt[:-1]
        answer = tokenizer(item["answer"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        return Encoded(prompt + answer, [False] * len(prompt) + [True] * len(answer), len(prompt))

    def question(self, item: Mapping, settings) -> str:
        return item["question"]

    def asking(self, text: str) -> dict:
        return {"question": text, "answer": "."}

    def gold(self, item: Mapping, settings) -> str:
        return item["answer"]


FORMATS = (Questions(),)
