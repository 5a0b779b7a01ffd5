"""Wrong data of every format and container: one line with the item, its line and the fix; or skipped and counted where asked."""

import csv
import gzip
import io
import json

import pytest

from doratune.cli.main import main
from doratune.data import DataSettings, encoder, load_items
from doratune.data.containers import LINE_BYTES
from doratune.data.encode import encode_all
from doratune.errors import UserError

GOOD = {
    "chat": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "instruction": {"instruction": "a", "output": "b"},
    "completion": {"prompt": "a", "completion": "b"},
    "text": {"text": "a"},
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
}
TOOL = {"name": "add", "parameters": {"type": "object", "properties": {}}}


def chat(*turns, **more):
    return {"messages": [{"role": role, "content": content} for role, content in turns]} | more


def calling(name, arguments="{}", **more):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}
    return {"messages": [{"role": "user", "content": "a"}, call]} | more


BAD = [
    ("chat", {"messages": []}, "no list of role and content under 'messages'"),
    ("chat", {"messages": [{"speaker": "a", "text": "a"}]}, "message 1 has no text under 'role'; its keys are 'speaker', 'text'"),
    ("chat", chat(("usr", "a"), ("assistant", "b")), "message 1 has the role 'usr'.*did you mean 'user'"),
    ("chat", chat(("user", "a"), ("bot", "b")), "message 2 has the role 'bot'; expected one of system, .*set roles: {bot: ROLE}"),
    ("chat", chat(("user", "a"), ("assistant", None)), "message 2 has null under 'content'"),
    ("chat", chat(("user", 5), ("assistant", "b")), "message 1 has a whole number under 'content'"),
    ("chat", chat(("user", [{"type": "image_url"}]), ("assistant", "b")), "message 1 holds a part of the type 'image_url'"),
    ("chat", chat(("user", "a"), ("assistant", "")), r"has an empty answer \(message 2\)"),
    ("chat", chat(("user", "a")), "no message of the role 'assistant'"),
    ("chat", calling("sub", tools=[TOOL, {"function": {"name": "mul"}}]), "message 2 calls the tool 'sub'; its tools are add, mul"),
    ("chat", calling("ad", tools=[TOOL]), "calls the tool 'ad'; its tools are add; did you mean 'add'"),
    ("chat", calling("add", "{oops", tools=[TOOL]), "calls 'add' with arguments that are no JSON object"),
    ("chat", calling(None), "message 2 has a tool call without a 'name'"),
    ("chat", chat(("user", "a"), ("assistant", "b"), tools=[{"title": "add"}]), "tool 1 under 'tools' has no 'name'"),
    ("chat", chat(("user", "a"), ("assistant", "b"), tools="add"), "no list under 'tools'"),
    ("sharegpt", {"conversations": "a"}, "no list of from and value under 'conversations'"),
    ("sharegpt", {"conversations": [{"from": "human"}]}, "message 1 has null under 'value'"),
    ("sharegpt", {"conversations": [{"from": "hman", "value": "a"}]}, "has the role 'hman'.*did you mean 'human'"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": " "}]}, "has an empty answer"),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "add"}]},
        "without a 'name'",
    ),
    ("sharegpt", GOOD["sharegpt"] | {"system": 5}, "has a whole number under 'system'"),
    ("instruction", {"instruction": "a"}, "no text under 'output'.*its keys are 'instruction'"),
    ("instruction", {"output": "a"}, "no text under 'instruction'.*its keys are 'output'"),
    ("instruction", {"instruction": "a", "output": ""}, "no text under 'output'"),
    ("instruction", {"instruction": "a", "output": "b", "system": "c"}, "'system', for which prompt plain has no place"),
    ("instruction", {"instruction": "a", "output": "b", "history": ["c"]}, "no pairs of question and answer under 'history'"),
    ("completion", {"prompt": "a"}, "no text under 'completion'"),
    ("completion", {"prompt": "a", "completion": " "}, "no text under 'completion'"),
    (
        "completion",
        {"prompt": [{"role": "user", "content": "a"}], "completion": []},
        "no list of role and content under 'completion'",
    ),
    ("text", {"text": ""}, "no text under 'text'"),
    ("text", {"text": ["a"]}, "no text under 'text'"),
    ("preference", {"prompt": "a", "chosen": "b"}, "no text under 'rejected'"),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "b"}, "the same answer under 'chosen' and 'rejected'"),
    ("preference", {"prompt": "a", "chosen": "", "rejected": "b"}, "an empty answer under 'chosen'"),
    ("preference", {"chosen": "b", "rejected": "c"}, "has no prompt"),
    ("preference", GOOD["preference"] | {"prompt": GOOD["chat"]["messages"]}, "a prompt that ends with the assistant's turn"),
    ("preference", {"chosen": GOOD["chat"]["messages"], "rejected": GOOD["chat"]["messages"][:1]}, "no answer under 'rejected'"),
]


def write(folder, *items):
    path = folder / "x.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


@pytest.mark.parametrize(("name", "item", "message"), BAD)
def test_one_line_or_skipped_and_counted(name, item, message, tmp_path):
    path = write(tmp_path, GOOD[name], item, GOOD[name])
    with pytest.raises(UserError, match=message) as caught:
        load_items(path)
    assert "x.jsonl: item 2" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400
    unusable = []
    items, kind = load_items(path, unusable=unusable)
    assert items == [GOOD[name]] * 2 and kind.name == name and len(unusable) == 1 and "item 2" in unusable[0]


@pytest.mark.parametrize("other", GOOD)
@pytest.mark.parametrize("name", GOOD)
def test_mixed_formats_in_a_file(name, other, tmp_path):
    path = write(tmp_path, GOOD[name], GOOD[other])
    if name == other:
        assert len(load_items(path)[0]) == 2
        return
    with pytest.raises(UserError, match=f"item 2 has no .*this item is {other} data"):
        load_items(path)
    assert load_items(path, unusable=[])[0] == [GOOD[name]]


ORDERS = [
    (chat(("assistant", "a"), ("user", "b"), ("assistant", "c")), "message 1 is the assistant's, and no user turn"),
    (chat(("user", "a"), ("user", "b"), ("assistant", "c")), "messages 1 and 2 are two user turns in a row"),
    (chat(("user", "a"), ("assistant", "b"), ("assistant", "c")), "messages 2 and 3 are two turns of the assistant"),
    (chat(("user", "a"), ("system", "b"), ("assistant", "c")), "message 2 is a system turn behind a user turn"),
    (chat(("user", "a"), ("tool", "b"), ("assistant", "c")), "message 2 is a tool's result, and no tool call"),
]


@pytest.mark.parametrize(("item", "message"), ORDERS)
def test_roles_out_of_order(item, message, tiny_tokenizer, tmp_path):
    items, kind = load_items(write(tmp_path, item))
    with pytest.raises(UserError, match=f"x.jsonl: item 1: {message}.*turn_order: any"):
        encode_all(items, encoder(kind), tiny_tokenizer, 512)
    assert encode_all(items, encoder(kind, DataSettings(turn_order="any")), tiny_tokenizer, 512)[0]


@pytest.mark.parametrize(
    ("name", "item", "where"),
    [
        ("chat", chat(("user", "a</s>b"), ("assistant", "c")), r"message 1 \(user\)"),
        ("chat", chat(("system", "<pad>"), ("user", "a"), ("assistant", "c")), r"message 1 \(system\)"),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b</s>"}]},
            r"message 2 \(assistant\)",
        ),
        ("instruction", {"instruction": "a", "input": "x<s>", "output": "b"}, "input"),
        ("instruction", {"instruction": "a", "output": "b</s>"}, "output"),
        ("completion", {"prompt": [{"role": "user", "content": "</s>"}], "completion": "b"}, r"message 1 \(user\)"),
    ],
)
def test_words_that_spell_a_special_token(name, item, where, tiny_tokenizer, tmp_path):
    items, kind = load_items(write(tmp_path, item))
    with pytest.raises(UserError, match=f"item 1: {where} holds the special token .*special_tokens: keep"):
        encode_all(items, encoder(kind), tiny_tokenizer, 512)
    assert encode_all(items, encoder(kind, DataSettings(special_tokens="keep")), tiny_tokenizer, 512)[0]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"query": "a", "reply": "b"}, "has the keys 'query', 'reply'.*columns: {instruction: query, output: reply}"),
        ({"query": "a", "answer": "b"}, "for questions data set columns: {question: query}"),
        ({"prompt": "a", "response": "b"}, "for completion data set columns: {completion: response}"),
        ({"dialog": []}, "for chat data set columns: {messages: dialog}"),
        ({"document": "a"}, "for text data set columns: {text: document}"),
        ({"x": 1, "y": 2}, "has the keys 'x', 'y', which no format has; there are preference"),
        ({}, "has the keys none"),
    ],
)
def test_unknown_keys_are_named_with_the_near_miss(item, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_items(write(tmp_path, item))


def test_columns_and_roles_rename(tmp_path):
    item = {"dialog": [{"speaker": "usr", "text": "a"}, {"speaker": "bot", "text": "b"}], "id": 7}
    settings = DataSettings(
        columns={"messages": "dialog", "role": "speaker", "content": "text"}, roles={"usr": "user", "bot": "assistant"}
    )
    (loaded,), kind = load_items(write(tmp_path, item), settings=settings)
    assert kind.conversation(loaded, "it", settings) == GOOD["chat"]["messages"] and loaded.raw == item
    settings = DataSettings(columns={"instruction": "q", "output": "a"})
    assert load_items(write(tmp_path, {"q": "x", "a": "y", "output": "other"}), settings=settings)[0] == [
        {"instruction": "x", "output": "y"}
    ]
    with pytest.raises(UserError, match=r"columns names 'instrction'.*did you mean 'instruction'"):
        load_items(write(tmp_path, GOOD["instruction"]), settings=DataSettings(columns={"instrction": "q"}))
    with pytest.raises(UserError, match="item 1 has no text under 'output'"):
        load_items(write(tmp_path, {"q": "x"}), settings=DataSettings(columns={"instruction": "q", "output": "a"}))


def test_the_format_can_be_overruled(tmp_path):
    both = GOOD["instruction"] | GOOD["text"] | GOOD["chat"]
    assert load_items(write(tmp_path, both))[1].name == "chat"
    for name in ("instruction", "alpaca", "text", "messages", "chat"):
        kind = load_items(write(tmp_path, both), data_format=name)[1]
        assert name in (kind.name, *kind.aliases)
    with pytest.raises(UserError, match="no list of from and value under 'conversations'"):
        load_items(write(tmp_path, both), data_format="sharegpt")


REPEATED = '{"instruction": "a", "output": "b", "output": "c"}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", f"{json.dumps(GOOD['text'])}\n{REPEATED}\n", r"item 2 \(line 2\) names 'output' twice"),
        ("x.json", f"[\n{json.dumps(GOOD['instruction'])},\n\n{REPEATED}]", r"item 2 \(line 4\) names 'output' twice"),
        ("x.jsonl", '{"messages": [{"role": "user", "role": "system", "content": "a"}]}', "names 'role' twice"),
        ("x.jsonl", json.dumps([GOOD["text"]]), r"x.jsonl holds a JSON list.*give it the ending .json"),
        ("x.jsonl", json.dumps([GOOD["text"]], indent=1), r"x.jsonl holds a JSON list.*give it the ending .json"),
        ("x.json", json.dumps({"version": 1, "data": [GOOD["text"]]}), "its items under 'data'; save that list alone"),
        ("x.json", json.dumps(GOOD["text"], indent=1), "is one JSON object"),
        ("x.json", json.dumps([GOOD["text"]]) + "x", "line 1: malformed JSON"),
        ("x.json", '[{"text": "a"} {"text": "b"}]', "line 1: malformed JSON"),
        ("x.csv", "instruction;output\na;b\n", "separate fields by ',', not by ';'"),
        ("x.csv", "text,text\na,b\n", "names the field 'text' twice"),
        ("x.csv", 'text,b\n"a\nc",d\ne\n', "line 4 has 1 cells, its header 2"),
        ("x.csv", 'text\n"a\n', "malformed table"),
        ("x.csv", "", "is empty"),
        ("x.csv", "text\n", "holds no examples"),
        ("x.parquet", "PAR1oops", "cannot be read as .parquet"),
        ("x.jsonl.gz", json.dumps(GOOD["text"]), "is a broken archive, or none"),
        ("x.jsonl.zst", json.dumps(GOOD["text"]), "is a broken archive, or none"),
        ("x.jsonl.xz", json.dumps(GOOD["text"]), "is a broken archive, or none"),
        ("x.jsonl.bz2", json.dumps(GOOD["text"]), "is a broken archive, or none"),
        ("x.pdf", "a", "the ending .pdf, which is no data file's; expected .*jsonl"),
        ("x.jsnl", "a", "did you mean '.jsonl'"),
    ],
)
def test_files_that_are_wrong(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_items(str(tmp_path / name))
    assert name in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.csv"])
def test_another_encoding(name, encoding, tmp_path):
    if name.endswith("csv"):
        text = "text\na\né\n"
    else:
        rows = [json.dumps({"text": text}, ensure_ascii=False) for text in ("a", "é")]
        text = "[\n{},\n{}\n]".format(*rows) if name == "x.json" else "\n".join(rows)
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(UserError, match="is not UTF-8 text") as caught:
        load_items(str(tmp_path / name))
    if encoding == "utf-16" and name != "x.csv":
        assert "it looks like UTF-16" in str(caught.value)
    if encoding == "latin-1" and name != "x.csv":
        assert f"line {3 if name == 'x.json' else 2}" in str(caught.value)


@pytest.mark.parametrize("keep", [0.3, 0.9])
@pytest.mark.parametrize("ending", ["gz", "zst", "xz", "bz2", "parquet"])
def test_archives_that_broke_off(ending, keep, tmp_path):
    import bz2
    import lzma
    import random

    import pyarrow
    from pyarrow import parquet

    words = random.Random(0)
    rows = [{"text": f"line {n} {words.random()}"} for n in range(4000)]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = tmp_path / ("x.parquet" if ending == "parquet" else f"x.jsonl.{ending}")
    if ending == "parquet":
        buffer = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
        whole = buffer.getvalue()
    else:
        zstd = lambda data: pyarrow.compress(data, "zstd", asbytes=True)  # noqa: E731
        whole = {"gz": gzip.compress, "zst": zstd, "xz": lzma.compress, "bz2": bz2.compress}[ending](data)
    path.write_bytes(whole)
    assert load_items(str(path))[0] == rows
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(UserError, match=r"broken archive|cannot be read as"):
        load_items(str(path))


def test_lines_without_end(tmp_path):
    with open(tmp_path / "x.jsonl", "wb") as file:
        file.write(json.dumps(GOOD["text"]).encode() + b"\n" + b'{"text": "')
        for _ in range((LINE_BYTES >> 20) + 1):
            file.write(b"a" * (1 << 20))
    with pytest.raises(UserError, match="line 2 is longer than 64 MiB"):
        load_items(str(tmp_path / "x.jsonl"))


def test_long_cells_are_read(tmp_path):
    with open(tmp_path / "x.csv", "w", newline="") as file:
        csv.writer(file).writerows([["text"], ["a" * 1_000_000]])
    assert len(load_items(str(tmp_path / "x.csv"))[0][0]["text"]) == 1_000_000


def test_folders_that_hold_no_data(tmp_path, tiny_folder):
    with pytest.raises(UserError, match=r"is a folder without data files; expected files that end in .arrow"):
        load_items(str(tmp_path))
    with pytest.raises(UserError, match="is the folder of a model or an adapter"):
        load_items(str(tiny_folder))
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read as a data set of `datasets`"):
        load_items(str(tmp_path))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--eval_data", "DATA", "--eval_size", "1"], "eval_data is .* and eval_size 1; set one of the two"),
        (["--data_format", "sharegtp"], "data_format is 'sharegtp'.*did you mean 'sharegpt'"),
        (["--data_weights", "1,2"], "data_weights are 2, the sources of data 1"),
        (["--loss", "first"], "loss is 'first'; expected one of all, last, item"),
        (["--columns", "{instrction: a}"], "columns names 'instrction'"),
    ],
)
def test_settings_that_are_wrong_end_with_status_2(more, message, tiny_folder, tmp_path, capsys):
    import re

    path = write(tmp_path, *[GOOD["chat"]] * 4)
    words = ["train", "--model", str(tiny_folder), "--data", path, "--output", str(tmp_path / "run")]
    assert main([*words, *[path if word == "DATA" else word for word in more]]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, error)
    assert not (tmp_path / "run").exists()


def test_preference_pairs_are_not_for_train(tiny_folder, tmp_path, capsys):
    path = write(tmp_path, GOOD["preference"])
    assert main(["train", "--model", str(tiny_folder), "--data", path, "--output", str(tmp_path / "run")]) == 2
    assert "TRL's DPOTrainer" in capsys.readouterr().err
