"""A conversation in the terminal: answers as they are written, history, other adapters, the base beside the adapter.

Ctrl-C ends an answer, which stays in the history as far as it came; Ctrl-D ends the conversation. With `compare`, base and adapter
answer the same questions, each with a history of its own. When the history no longer fits, its oldest turns are left out and said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from transformers import TextStreamer

from ..errors import UserError, near_misses
from ..evaluation.generate import only_these
from .adapters import BASE, NamedAdapters
from .prompts import rendered
from .sampling import Sampling, check_length

HELP = """\
/use NAME          answer with this adapter (base: without)      /adapters          their names
/system TEXT       the system prompt; without TEXT: none         /temperature T     0 is greedy
/clear             forget the conversation                       /history           show it
/help              this                                          /quit              or Ctrl-D; Ctrl-C ends an answer"""


class AnswerStream(TextStreamer):
    """Writes the new text as it comes, and keeps it."""

    def __init__(self, tokenizer, write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.text = write, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self.write(text)


@dataclass
class Conversation:
    """Turns with a model; `write` shows text as it is, without a line break of its own."""

    adapters: NamedAdapters
    sampling: Sampling
    write: Callable[[str], None]
    template: str = "auto"
    system: str | None = None
    compare: bool = False
    speaker: str = BASE
    histories: dict[str, list[dict]] = field(default_factory=dict)
    turns: int = 0

    def __post_init__(self):
        if self.compare and not self.adapters.folders:
            raise UserError("compare needs an adapter beside the base; give --adapter FOLDER")
        if self.system is not None and self._kind() != "chat":
            raise UserError("system needs the tokenizer's chat template, which is not in use here; drop it")

    def _kind(self) -> str:
        fallback = "chat" if self.adapters.tokenizer.chat_template else "plain"
        return fallback if self.template == "auto" else self.template

    def history(self, speaker: str) -> list[dict]:
        """One for all, so that another adapter goes on where one ended; one for each where they are compared."""
        return self.histories.setdefault(speaker if self.compare else "", [])

    def take(self, line: str) -> bool:
        """One line of the user: a question or a command. False: the conversation is over."""
        line = line.strip()
        if not line:
            return True
        if line.startswith("/"):
            return self._command(*line[1:].partition(" ")[::2])
        speakers = [BASE, self.speaker] if self.compare and self.speaker != BASE else [self.speaker]
        for speaker in speakers:
            self.answer(line, speaker)
        self.turns += 1
        return True

    def answer(self, question: str, speaker: str) -> str:
        """One answer, written as it comes and put into the history with its question.

        Raises:
            UserError: a question that does not fit into the model, or that the chat template refuses.
        """
        model, history = self.adapters.use(speaker), self.history(speaker)
        messages = [*history, {"role": "user", "content": question}]
        ids, messages = self._prompt(model, messages)
        self.write(f"{speaker}> ")
        stream = AnswerStream(self.adapters.tokenizer, self.write)
        torch.manual_seed(self.sampling.seed + self.turns)
        try:
            self._generate(model, ids, stream)
        except KeyboardInterrupt:
            stream.end()
            self.write(" …\n(stopped)\n")
        history[:] = [*messages, {"role": "assistant", "content": stream.text}]
        return stream.text

    def _generate(self, model, ids: list[int], stream: AnswerStream) -> None:
        tokens = torch.tensor([ids], device=model.device)
        config = self.sampling.config(model, self.adapters.tokenizer)
        with torch.no_grad(), only_these(model):
            model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), generation_config=config, streamer=stream)
        self.write("\n")

    def _prompt(self, model, messages: list[dict]) -> tuple[list[int], list[dict]]:
        """(token ids, the messages that are in them): the oldest turns are left out where they do not fit."""
        tokenizer, left_out = self.adapters.tokenizer, 0
        if self._kind() != "chat":  # these prompts are of one text
            return self._checked(model, rendered({"prompt": messages[-1]["content"]}, tokenizer, self._kind())), messages[-1:]
        while True:
            ids = rendered({"messages": messages}, tokenizer, "chat", self.system)
            try:
                self._checked(model, ids)
            except UserError:
                if len(messages) < 3:
                    raise
                messages, left_out = messages[2:], left_out + 1
                continue
            if left_out:
                self.write(f"(the oldest {left_out} of the turns no longer fit and were left out)\n")
            return ids, messages

    def _checked(self, model, ids: list[int]) -> list[int]:
        check_length(ids, model, self.sampling.max_new_tokens, "the conversation")
        return ids

    def _command(self, name: str, value: str) -> bool:
        value = value.strip()
        commands = {
            "use": self._use, "adapters": self._adapters, "system": self._system, "temperature": self._temperature,
            "clear": self._clear, "history": self._show, "help": lambda _: self.write(HELP + "\n"), "quit": None, "exit": None,
        }  # fmt: skip
        if name not in commands:
            raise UserError(f"unknown command /{name}{near_misses(name, commands)}; /help lists them")
        if commands[name] is None:
            return False
        commands[name](value)
        return True

    def _use(self, name: str) -> None:
        if not name:
            raise UserError(f"/use needs a name: {', '.join(self.adapters.names)}")
        self.adapters.use(name)
        self.speaker = name
        self.write(f"(using {name})\n")

    def _adapters(self, _: str) -> None:
        for name in self.adapters.names:
            self.write(f"{'*' if name == self.speaker else ' '} {name}\n")

    def _system(self, text: str) -> None:
        if text and self._kind() != "chat":
            raise UserError("system needs the tokenizer's chat template, which is not in use here")
        self.system = text or None
        self.write("(system prompt set)\n" if text else "(no system prompt)\n")

    def _temperature(self, text: str) -> None:
        try:
            value = float(text)
        except ValueError:
            raise UserError(f"temperature is {text!r}; expected a number, e.g. /temperature 0.7") from None
        self.sampling = replace(self.sampling, temperature=value)
        self.write(f"(temperature {value:g})\n")

    def _clear(self, _: str) -> None:
        self.histories.clear()
        self.write("(forgotten)\n")

    def _show(self, _: str) -> None:
        for speaker, history in self.histories.items():
            for message in history:
                self.write(f"{speaker + ' ' if speaker else ''}{message['role']}: {message['content']}\n")
