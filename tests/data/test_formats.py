"""Each data format in three chat templates with different habits: the text and the loss mask are those written here by hand."""

import copy
import json

import pytest

from doratune.data import DataSettings, encoder, load_items
from doratune.data.formats import format_named, formats
from doratune.errors import UserError

NO_SYSTEM = (  # Gemma's habits: no system role, the assistant is called model
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end>\n{% endfor %}"
)
THINKING = (  # Qwen3's habits: the last answer gets a thought, earlier answers lose theirs
    "{% set last = messages | length - 1 %}{% for m in messages %}<turn>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% if loop.index0 == last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% else %}{{ m.content }}{% endif %}<end>\n{% endfor %}"
)
TOOLS = (  # Hermes' habits: tools in the system turn, calls and results in tags
    "{% if tools %}<turn>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}"
    "{% for t in tools %}{{ t | tojson }}\n{% endfor %}<end>\n{% elif messages[0].role == 'system' %}"
    "<turn>system\n{{ messages[0].content }}<end>\n{% endif %}{% for m in messages if m.role != 'system' %}"
    "<turn>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    "<end>\n{% endfor %}"
)
TEMPLATES = {"no system": NO_SYSTEM, "thinking": THINKING, "tools": TOOLS}

ADD = {"name": "add", "description": "Add two numbers", "parameters": {"type": "object", "properties": {}}}
ADD_TEXT = '{"type": "function", "function": {"name": "add", "description": "Add two numbers", "parameters": {"type": "object", "properties": {}}}}'  # noqa: E501
CALL_TEXT = '<call>{"name": "add", "arguments": {"a": 1, "b": 2}}</call>'

EXPECTED = {  # conversation → template → its text, what is learned between « and »
    "short": {
        "no system": "<turn>user\nhi there<end>\n<turn>model\n«one<end>\n»",
        "thinking": "<turn>user\nhi there<end>\n<turn>assistant\n<think>\n\n</think>\n\n«one<end>\n»",
        "tools": "<turn>user\nhi there<end>\n<turn>assistant\n«one<end>\n»",
    },
    "long": {
        "no system": None,
        "thinking": "<turn>system\nbe kind<end>\n<turn>user\nhi<end>\n<turn>assistant\n«one<end>\n»<turn>user\nmore<end>\n"
        "<turn>assistant\n<think>\n\n</think>\n\n«two\nlines<end>\n»",
        "tools": "<turn>system\nbe kind<end>\n<turn>user\nhi<end>\n<turn>assistant\n«one<end>\n»<turn>user\nmore<end>\n"
        "<turn>assistant\n«two\nlines<end>\n»",
    },
    "called": {
        "no system": None,
        "thinking": None,
        "tools": f"<turn>system\n{ADD_TEXT}\n<end>\n<turn>user\n1 + 2?<end>\n<turn>assistant\n«{CALL_TEXT}<end>\n»"
        "<turn>tool\n3<end>\n<turn>assistant\n«It is 3.<end>\n»",
    },
}
REFUSED = {"long": "has no role for a system text; set system_as: user", "called": "drops the list of tools"}
MERGED = "<turn>user\nbe kind\n\nhi<end>\n<turn>model\n«one<end>\n»<turn>user\nmore<end>\n<turn>model\n«two\nlines<end>\n»"


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def said(name, value):
    return {"from": name, "value": value}


CALL = {"name": "add", "arguments": {"a": 1, "b": 2}}
USER, LONG = (
    turn("user", "hi there"),
    [turn("system", "be kind"), turn("user", "hi"), turn("assistant", "one"), turn("user", "more")],
)
CALLED = [
    turn("user", "1 + 2?"),
    turn("assistant", None, tool_calls=[{"id": "c1", "type": "function", "function": CALL | {"arguments": '{"a": 1, "b": 2}'}}]),
    turn("tool", "3", tool_call_id="c1"),
]
TWO, THREE = turn("assistant", "two\nlines"), turn("assistant", "It is 3.")
SAID = [said("human", "1 + 2?"), said("function_call", json.dumps(CALL)), said("observation", "3")]

ITEMS = {  # format → conversation → the item as that format spells it
    "chat": {
        "short": {"messages": [USER, turn("assistant", "one")]},
        "long": {"messages": [*LONG, TWO]},
        "called": {"messages": [*CALLED, THREE], "tools": [{"type": "function", "function": ADD}]},
    },
    "sharegpt": {
        "short": {"conversations": [said("human", "hi there"), said("gpt", "one")]},
        "long": {
            "system": "be kind",
            "conversations": [said("human", "hi"), said("gpt", "one"), said("user", "more"), said("assistant", "two\nlines")],
        },
        "called": {"conversations": [*SAID, said("gpt", "It is 3.")], "tools": json.dumps([ADD])},
    },
    "instruction": {
        "short": {"instruction": "hi there", "input": "", "output": "one"},
        "long": {"instruction": "more", "output": "two\nlines", "system": "be kind", "history": [["hi", "one"]]},
    },
    "completion": {
        "short": {"prompt": "hi there", "completion": "one"},
        "long": {"prompt": LONG, "completion": [TWO]},
        "called": {"prompt": CALLED, "completion": [THREE], "tools": [ADD]},
    },
    "questions": {"short": {"question": "hi there", "answer": "one"}},
    "preference": {
        "short": {"prompt": "hi there", "chosen": "one", "rejected": "no"},
        "long": {"prompt": LONG, "chosen": [TWO], "rejected": [turn("assistant", "no")]},
        "called": {
            "conversations": SAID,
            "tools": json.dumps([ADD]),
            "chosen": said("gpt", "It is 3."),
            "rejected": said("gpt", "It is 4."),
        },
    },
}
ONE_ANSWER = ("completion", "preference")
"""Formats that learn the last answer alone."""


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def marked(example, tokenizer) -> str:
    """The text of an example, each run of learned tokens between « and »."""
    text, inside = "", False
    for token, learned in zip(example.ids, example.answer, strict=True):
        text += ("»" if inside else "«") * (learned != inside)
        text, inside = text + tokenizer.decode([token]), learned
    return text + "»" * inside


def last_only(text: str) -> str:
    head, _, tail = text.rpartition("«")
    return head.replace("«", "").replace("»", "") + "«" + tail


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(("name", "conversation"), [(name, c) for name, items in ITEMS.items() for c in items])
def test_the_text_and_the_mask_are_as_written(name, conversation, template, tiny_tokenizer, tmp_path):
    tokenizer, item = with_template(tiny_tokenizer, TEMPLATES[template]), ITEMS[name][conversation]
    settings = DataSettings(prompt="template")
    (tmp_path / "x.jsonl").write_text(json.dumps(item))
    (loaded,), kind = load_items(str(tmp_path / "x.jsonl"), settings=settings)
    assert kind.name == name and loaded == item
    expected = EXPECTED[conversation][template]
    if expected is None:
        message = REFUSED[conversation]
        with pytest.raises(UserError, match=message):
            kind.encode(loaded, tokenizer, settings)
        return
    expected = last_only(expected) if name in ONE_ANSWER else expected
    assert marked(kind.encode(loaded, tokenizer, settings), tokenizer) == expected
    if name != "preference":
        assert marked(encoder(kind, settings)(loaded, tokenizer), tokenizer) == expected
        last = DataSettings(prompt="template", loss="last")
        assert marked(kind.encode(loaded, tokenizer, last), tokenizer) == last_only(expected)


@pytest.mark.parametrize("name", ["chat", "sharegpt", "instruction", "completion", "preference"])
def test_a_system_text_goes_into_the_first_user_turn_where_it_is_told_to(name, tiny_tokenizer):
    tokenizer, settings = with_template(tiny_tokenizer, NO_SYSTEM), DataSettings(prompt="template", system_as="user")
    example = format_named(name).encode(ITEMS[name]["long"], tokenizer, settings)
    assert marked(example, tokenizer) == (last_only(MERGED) if name in ONE_ANSWER else MERGED)


def test_pairs_of_whole_conversations_and_names_of_either_kind(tiny_tokenizer):
    """UltraFeedback's layout: the prompt as text, `messages` with the chosen answer in it, two whole conversations."""
    kind, settings = format_named("preference"), DataSettings()
    whole = {side: [*LONG, turn("assistant", text)] for side, text in (("chosen", "yes"), ("rejected", "no"))}
    for more in (
        {},
        {"prompt": "be kind"},
        {"messages": whole["chosen"]},
        {"prompt": "x", "messages": whole["chosen"], "score": 3},
    ):
        prompt, chosen, rejected = kind.pair(more | whole, "it", settings)
        assert (prompt, chosen, rejected) == (LONG, [turn("assistant", "yes")], [turn("assistant", "no")])
    tokenizer = with_template(tiny_tokenizer, TOOLS)
    for name, key, turns in (
        ("sharegpt", "conversations", [USER, turn("assistant", "one")]),
        ("chat", "messages", [said("human", "hi there"), said("gpt", "one")]),
    ):
        format_named(name).check({key: turns}, "it", settings)
        assert marked(format_named(name).encode({key: turns}, tokenizer, settings), tokenizer) == EXPECTED["short"]["tools"]


def test_a_rejected_answer_is_rendered_too(tiny_tokenizer):
    tokenizer, kind = with_template(tiny_tokenizer, TOOLS), format_named("preference")
    for conversation, other in (("short", "no"), ("long", "no"), ("called", "It is 4.")):
        parts = dict(kind.parts(ITEMS["preference"][conversation], tokenizer, DataSettings()))
        assert list(parts) == ["chosen", "rejected"]
        expected = last_only(EXPECTED[conversation]["tools"])
        assert marked(parts["rejected"], tokenizer) == expected[: expected.rindex("«")] + f"«{other}<end>\n»"


RAW = {
    "text": [({"text": text}, f"«{text}</s>»") for text in ("once", "upon a\ntime", "<|im_start|>user é")],
    "completion": [
        ({"prompt": p, "completion": c}, f"{p}«{c}</s>»") for p, c in (("Q: a\nA:", " b"), ("x", "y\n\nz"), ("<s>hi", "there"))
    ],
    "instruction": [
        (
            {"instruction": "hi", "output": "one"},
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nhi\n\n### Response:\n«one</s>»",
        ),
        (
            {"instruction": "hi", "input": "", "output": "one\ntwo"},
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nhi\n\n### Response:\n«one\ntwo</s>»",
        ),
        (
            {"instruction": "hi", "input": "there", "output": "é"},
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nhi\n\n### Input:\nthere\n\n### Response:\n«é</s>»",
        ),
    ],
}


@pytest.mark.parametrize("template", [*TEMPLATES.values(), None])
@pytest.mark.parametrize("name", RAW)
def test_texts_that_no_template_renders(name, template, tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, template)
    for item, expected in RAW[name]:
        format_named(name).check(item, "it", DataSettings())
        example = encoder(name)(item, tokenizer)
        assert tokenizer.decode(example.ids) == expected.replace("«", "").replace("»", "")
        assert tokenizer.decode([i for i, a in zip(example.ids, example.answer) if a]) == expected[expected.index("«") + 1 : -1]


def test_the_item_says_which_of_its_answers_are_learned(tiny_tokenizer):
    tokenizer, settings = with_template(tiny_tokenizer, TOOLS), DataSettings(loss="item")
    turns = [
        turn("user", "a"),
        turn("assistant", "b"),
        turn("user", "c"),
        turn("assistant", "d"),
        turn("user", "e"),
        turn("assistant", "f"),
    ]

    def text(**flags):
        messages = [m | flags.get(m["content"], {}) for m in turns]
        return marked(format_named("chat").encode({"messages": messages}, tokenizer, settings), tokenizer)

    whole = "<turn>user\na<end>\n<turn>assistant\n«b<end>\n»<turn>user\nc<end>\n<turn>assistant\n«d<end>\n»<turn>user\ne<end>\n"
    whole += "<turn>assistant\n«f<end>\n»"
    assert text() == whole
    assert text(b={"train": False}) == text(b={"weight": 0}) == whole.replace("«b<end>\n»", "b<end>\n")
    assert text(b={"train": False}, f={"weight": 0.0}) == whole.replace("«b<end>\n»", "b<end>\n").replace("«f<end>\n»", "f<end>\n")
    with pytest.raises(UserError, match="none of its answers is to be learned"):
        text(b={"train": False}, d={"train": False}, f={"weight": 0})
    item = {"conversations": [said("human", "a"), said("gpt", "b") | {"train": False}, said("human", "c"), said("gpt", "d")]}
    example = format_named("sharegpt").encode(item, tokenizer, settings)
    assert marked(example, tokenizer).count("«") == 1 and marked(example, tokenizer).endswith("«d<end>\n»")


@pytest.mark.parametrize("answer", ['{"a": 1}', "[1, 2]", '[{"name": "x"}]', "[not json", "{}", "[]"])
def test_an_answer_may_be_json(answer, tiny_tokenizer):
    tokenizer, settings = with_template(tiny_tokenizer, TOOLS), DataSettings(prompt="template")
    text = f"<turn>user\n{answer}<end>\n<turn>assistant\n«{answer}<end>\n»"
    for name, item in (
        ("completion", {"prompt": answer, "completion": answer}),
        ("preference", {"prompt": answer, "chosen": answer, "rejected": "no"}),
        ("instruction", {"instruction": answer, "output": answer}),
        ("chat", {"messages": [turn("user", answer), turn("assistant", answer)]}),
        ("sharegpt", {"conversations": [said("human", answer), said("gpt", answer)]}),
    ):
        format_named(name).check(item, "it", settings)
        assert marked(format_named(name).encode(item, tokenizer, settings), tokenizer) == text
    item = {"prompt": answer, "completion": answer}
    assert marked(format_named("completion").encode(item, tokenizer, DataSettings()), tokenizer).endswith(f"«{answer}</s>»")


MARKS = (
    "{% for m in messages %}<turn>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<end>{% endgeneration %}{% else %}{{ m.content }}<end>{% endif %}{% endfor %}"
)


def test_marks_of_the_template_and_what_the_settings_ask_for(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, MARKS)
    turns = [turn("user", "a"), turn("assistant", "b", train=False), turn("user", "c"), turn("assistant", "d")]
    expected = {"all": "«b<end>»", "last": "b<end>", "item": "b<end>"}
    for loss, first in expected.items():
        example = format_named("chat").encode({"messages": turns}, tokenizer, DataSettings(loss=loss))
        text = f"<turn>user\na<end><turn>assistant\n{first}<turn>user\nc<end><turn>assistant\n«d<end>»"
        assert marked(example, tokenizer) == text


def test_thinking_of_an_answer_is_learned_where_the_template_shows_it(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, THINKING)
    item = {"messages": [turn("user", "a"), turn("assistant", "b", reasoning_content="because")]}
    example = format_named("chat").encode(item, tokenizer, DataSettings())
    assert marked(example, tokenizer) == "<turn>user\na<end>\n<turn>assistant\n<think>\n«because\n</think>\n\nb<end>\n»"


def test_every_format_has_items_here():
    assert {one.name for one in formats()} == {*ITEMS, *RAW, "visual"}  # test_visual.py
