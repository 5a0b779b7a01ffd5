"""An Ollama Modelfile for a GGUF file: where it lies, its chat template in Ollama's own language, where an answer ends.

The template is read off what the tokenizer renders: a conversation of marks is rendered, and the text between the marks is the
template's. It is written only where it renders three conversations exactly as the tokenizer does; without it Ollama looks for a
template that it knows in the file. Source: Ollama's documentation of the Modelfile. Cost: a few renderings.
"""

from __future__ import annotations

from dataclasses import dataclass

MARKS = ("\u0001s\u0001", "\u0001a\u0001", "\u0001b\u0001", "\u0001c\u0001")
_CONVERSATIONS = (("user",), ("user", "assistant", "user"), ("system", "user", "assistant", "user", "assistant", "user"))


@dataclass(frozen=True)
class Turns:
    """The text in front of and behind the content of each role."""

    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    default_system: str | None = None

    def render(self, messages: list[dict]) -> str:
        """What the Modelfile's template makes of a conversation that waits for an answer."""
        messages = list(messages)
        if self.default_system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.default_system})
        parts = (getattr(self, m["role"]) for m in messages)
        return "".join(before + m["content"] + after for m, (before, after) in zip(messages, parts)) + self.assistant[0]

    def template(self) -> str:
        roles = [(name, getattr(self, name)) for name in ("system", "user", "assistant") if getattr(self, name)]
        tests = (
            f'{{{{ {"if" if i == 0 else "else if"} eq .Role "{name}" }}}}{before}{{{{ .Content }}}}{after}'
            for i, (name, (before, after)) in enumerate(roles)
        )
        return "{{ range .Messages }}" + "".join(tests) + "{{ end }}{{ end }}" + self.assistant[0]


def modelfile(tokenizer, gguf_name: str) -> str:
    """The text of the Modelfile beside the GGUF file of this name."""
    lines = [f"FROM ./{gguf_name}"]
    turns = turns_of(tokenizer)
    if turns is None and tokenizer.chat_template:
        lines.append("# its chat template is in the GGUF file; Ollama has no words for it as one template of turns")
    if turns is not None:
        lines.append(f'TEMPLATE """{turns.template()}"""')
        if turns.system is None:
            lines.insert(1, "# its chat template takes no system prompt: Ollama's SYSTEM has no effect")
        if turns.default_system is not None:
            lines.append(f'SYSTEM """{turns.default_system}"""')
        stop = turns.assistant[1].strip() or tokenizer.eos_token
        lines.append(f'PARAMETER stop "{stop}"')
    elif tokenizer.eos_token:
        lines.append(f'PARAMETER stop "{tokenizer.eos_token}"')
    return "\n".join(lines) + "\n"


def turns_of(tokenizer) -> Turns | None:
    """The tokenizer's chat template as text around each turn, or None where it is not made of turns (or there is none)."""
    if not tokenizer.chat_template:
        return None
    try:
        turns = _read_off(tokenizer)
    except Exception:  # a template can raise whatever it likes
        return None
    return turns if turns is not None and all(_same(tokenizer, turns, roles) for roles in _CONVERSATIONS) else None


def _read_off(tokenizer) -> Turns | None:
    s, a, b, c = MARKS
    text = rendered(tokenizer, [("user", a), ("assistant", b), ("user", c)])
    first, rest = text.split(a, 1)
    to_answer, rest = rest.split(b, 1)
    to_question, after = rest.split(c, 1)
    if after != to_answer:
        return None
    answer_end = _answer_end(first, to_question, tokenizer.eos_token or "")
    before = to_question[len(answer_end) :]
    cut = _cut(to_answer, answer_end)
    user, assistant = (before, to_answer[:cut]), (to_answer[cut:], answer_end)
    system, default = _system(tokenizer, user, first[: len(first) - len(before)])
    return Turns(system, user, assistant, default)


def _system(tokenizer, user: tuple[str, str], front: str) -> tuple[tuple[str, str] | None, str | None]:
    """(text around a system prompt, the system prompt that the template adds by itself)."""
    s, a = MARKS[:2]
    try:
        text = rendered(tokenizer, [("system", s), ("user", a)])
    except Exception:  # this template takes no system prompt
        return None, None
    before, rest = text.split(s, 1)
    between, _ = rest.split(a, 1)
    if not between.endswith(user[0]):
        raise ValueError("the system prompt lies inside a question")
    system = before, between[: len(between) - len(user[0])]
    if not front:
        return system, None
    inside = front.startswith(system[0]) and front.endswith(system[1])
    return system, front[len(system[0]) : len(front) - len(system[1])] if inside else None


def _same(tokenizer, turns: Turns, roles: tuple[str, ...]) -> bool:
    if "system" in roles and turns.system is None:
        return True
    messages = [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]
    return turns.render(messages) == rendered(tokenizer, [(m["role"], m["content"]) for m in messages])


def rendered(tokenizer, turns: list[tuple[str, str]]) -> str:
    """The conversation, waiting for an answer, without the <bos> that the engine adds by itself."""
    messages = [{"role": role, "content": content} for role, content in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text.removeprefix(tokenizer.bos_token) if tokenizer.bos_token and _adds_bos(tokenizer) else text


def _adds_bos(tokenizer) -> bool:
    return tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _answer_end(first: str, to_question: str, end: str) -> str:
    """Of the text between an answer and the next question, what ends the answer; the rest begins a question, as the first one."""
    place = to_question.find(end) if end else -1
    if place >= 0:
        question = to_question[place + len(end) :].lstrip()
        if first.endswith(question):
            return to_question[: len(to_question) - len(question)]
    return to_question[: len(to_question) - len(_common_end(first, to_question))]


def _common_end(one: str, other: str) -> str:
    n = 0
    while n < min(len(one), len(other)) and one[-1 - n] == other[-1 - n]:
        n += 1
    return one[len(one) - n :]


def _cut(to_answer: str, answer_end: str) -> int:
    """Where a question ends and an answer begins: behind the end that answers have too, if the text has it."""
    place = to_answer.find(answer_end) if answer_end else -1
    return place + len(answer_end) if place >= 0 else 0
