"""One data set in every container, compression, folder and split: the same items, each with its place."""

import bz2
import gzip
import json
import lzma

import pytest

from doratune.data import DataSettings, load_items
from doratune.data.sources import each_item, files_of

ITEMS = [{"instruction": f"ask {n}", "input": 'a\nb, "c"' * (n % 2), "output": f"é {n}"} for n in range(5)]
CHAT = [{"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]} for n in range(3)]
CALLED = {
    "messages": [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "3"},
    ]
}


def zstd(data: bytes) -> bytes:
    import pyarrow

    return pyarrow.compress(data, "zstd", asbytes=True)


def written(path, items):
    import csv

    import pyarrow
    from pyarrow import parquet

    inner = path.name.split(".")[1]
    if inner in ("csv", "tsv"):
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="," if inner == "csv" else "\t")
            writer.writerow(items[0])
            writer.writerows([v if isinstance(v, str) else json.dumps(v) for v in item.values()] for item in items)
    elif inner == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(items), path)
    elif inner == "arrow":
        table = pyarrow.Table.from_pylist(items)
        with pyarrow.ipc.new_stream(str(path), table.schema) as file:
            file.write_table(table)
    else:
        lines = inner in ("jsonl", "ndjson")
        text = "\n".join(json.dumps(item, ensure_ascii=False) for item in items) if lines else json.dumps(items, indent=1)
        path.write_bytes(text.encode())
    packers = {".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress, ".xz": lzma.compress}
    if path.suffix in packers:
        path.write_bytes(packers[path.suffix](path.read_bytes()))
    return str(path)


NAMES = ["x.json", "x.jsonl", "x.ndjson", "x.csv", "x.tsv", "x.parquet", "x.arrow"]
PACKED = ["x.json.gz", "x.jsonl.zst", "x.jsonl.bz2", "x.csv.xz", "x.tsv.gz", "x.parquet.gz"]


@pytest.mark.parametrize("name", NAMES + PACKED)
def test_the_same_items_from_every_file(name, tmp_path):
    items, kind = load_items(written(tmp_path / name, ITEMS))
    assert items == ITEMS and kind.name == "instruction"
    assert [item.where for item in items] == [f"{tmp_path / name}: item {n}" for n in range(1, 6)]
    assert load_items(f"{tmp_path / name}[:2]")[0] == ITEMS[:2]


@pytest.mark.parametrize("name", NAMES)
def test_conversations_from_every_file(name, tmp_path):
    """Also where a table holds them as JSON text, or gives every message every field."""
    settings = DataSettings()
    items, kind = load_items(written(tmp_path / name, [*CHAT, CALLED]))
    assert kind.name == "chat"
    messages = [kind.conversation(item, "it", settings) for item in items]
    assert messages[:3] == [item["messages"] for item in CHAT]
    assert [set(m) for m in messages[3]] == [{"role", "content"}, {"role", "content", "tool_calls"}] + [{"role", "content"}] * 2
    assert messages[3][1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}


def test_lines_are_those_of_the_file(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(ITEMS, indent=2))
    assert [item.line for item in each_item(str(tmp_path / "x.json"))] == [2, 7, 12, 17, 22]
    (tmp_path / "x.jsonl").write_text("\n\n".join(json.dumps(item) for item in ITEMS))
    assert [item.line for item in each_item(str(tmp_path / "x.jsonl"))] == [1, 3, 5, 7, 9]
    written(tmp_path / "x.csv", ITEMS)
    assert [item.line for item in each_item(str(tmp_path / "x.csv"))] == [2, 3, 5, 6, 8]


def test_a_folder_is_its_files(tmp_path):
    for name in ("b.jsonl.gz", "a.json", "c.parquet"):
        written(tmp_path / name, ITEMS)
    (tmp_path / "notes.txt").write_text("no data")
    (tmp_path / ".hidden.json").write_text("no data")
    assert [path.name for path in files_of(tmp_path)] == ["a.json", "b.jsonl.gz", "c.parquet"]
    items, _ = load_items(str(tmp_path))
    assert items == ITEMS * 3 and items[5].where == f"{tmp_path / 'b.jsonl.gz'}: item 1"
    assert len(load_items([str(tmp_path), str(tmp_path / "a.json[:1]")])[0]) == 16


@pytest.mark.parametrize("other", ["test.json", "validation.jsonl", "dev-00000.parquet", "eval.csv"])
def test_a_folder_with_a_test_part_gives_its_training_part(other, tmp_path):
    for name in ("train-00000-of-00002.json", "train-00001-of-00002.json", other):
        written(tmp_path / name.replace("-of-", "_"), ITEMS)
    assert len(load_items(str(tmp_path))[0]) == 10


def test_data_sets_that_were_saved(tmp_path):
    from datasets import Dataset, DatasetDict

    from doratune.errors import UserError

    whole = Dataset.from_list(ITEMS)
    whole.save_to_disk(tmp_path / "one")
    DatasetDict(train=whole, small=whole.select(range(2))).save_to_disk(tmp_path / "two")
    assert load_items(str(tmp_path / "one"))[0] == load_items(str(tmp_path / "two"))[0] == ITEMS
    assert load_items(f"{tmp_path / 'two'}:small")[0] == ITEMS[:2]
    assert load_items(f"{tmp_path / 'two'}:small[:1]")[0] == ITEMS[:1]
    for name, message in (
        (f"{tmp_path / 'two'}:tset", "has no split 'tset'; it has train, small"),
        (f"{tmp_path / 'one'}:x", "no splits"),
    ):
        with pytest.raises(UserError, match=message):
            load_items(name)


def test_weights_say_how_often_an_item_is_seen(tmp_path):
    a, b = (
        written(tmp_path / "a.json", ITEMS),
        written(tmp_path / "b.json", [{"instruction": str(n), "output": "x"} for n in range(10)]),
    )
    items, _ = load_items([a, b], weights=[2, 0.5], seed=3)
    assert items[:10] == ITEMS * 2 and len(items) == 15
    half = [item["instruction"] for item in items[10:]]
    assert len(set(half)) == 5 and half == sorted(half, key=int)
    assert items == load_items([a, b], weights=[2, 0.5], seed=3)[0] != load_items([a, b], weights=[2, 0.5], seed=4)[0]
    assert len(load_items([a, b], weights=[1.2, 1])[0]) == 16


@pytest.mark.parametrize(
    "name", ["owner/name", "owner/name:test", "owner/name#main:train", "owner/name:train[:10%]", "owner/name:test[:5]"]
)
def test_a_hub_id_with_configuration_and_split_is_asked_of_the_hub_once(name):
    """Offline, as in all tests: one line that names the data set."""
    from doratune.errors import UserError

    with pytest.raises(UserError, match="cannot load the data set owner/name") as caught:
        load_items(name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["owner/name/more", "name:test", "owner/na me", "owner/name#:x", "owner/name#a#b"])
def test_what_no_hub_id_can_be_is_said(name):
    from doratune.errors import UserError

    with pytest.raises(UserError, match="no such file or known set"):
        load_items(name)
