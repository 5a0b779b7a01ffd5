"""Data that is read while it is trained on: every example once an epoch, the same after a resume, in memory a buffer at most."""

import itertools
import json

import pytest
from test_packing import recipe

from doratune.data import sources
from doratune.errors import UserError
from doratune.training import streaming
from doratune.training.streaming import StreamedRows
from doratune.training.train import train


def written(path, name, count):
    items = [{"instruction": f"{name} {n}", "output": "true" * (n % 3 + 1)} for n in range(count)]
    path.write_text("\n".join(json.dumps(item) for item in items))
    return str(path)


def texts(rows, tokenizer):
    return [tokenizer.decode(row["input_ids"]).split("### Instruction:\n")[1].split("\n")[0] for row in rows]


@pytest.fixture
def small_buffer(monkeypatch):
    monkeypatch.setattr(streaming, "BUFFER", 16)


def streamed(tiny_folder, tmp_path, data, **settings):
    return recipe(tiny_folder, tmp_path, data=data, streaming=True, max_steps=5, eval_size=0, **settings)


def test_every_example_once_an_epoch_in_another_order(tiny_folder, tiny_tokenizer, tmp_path, small_buffer):
    data = written(tmp_path / "a.jsonl", "a", 100)
    rows = StreamedRows(streamed(tiny_folder, tmp_path, data), tiny_tokenizer)
    first, again = texts(rows, tiny_tokenizer), texts(rows, tiny_tokenizer)
    assert first == again and sorted(first) == sorted(f"a {n}" for n in range(100)) != first
    rows.set_epoch(1)
    second = texts(rows, tiny_tokenizer)
    assert second != first and sorted(second) == sorted(first)
    rows.packing = True
    packs = list(rows)
    assert len(packs) < 60 and sum(len(row["lengths"]) for row in packs) == 100 and max(row["length"] for row in packs) <= 700


def test_sources_take_turns_as_often_as_their_weights_say(tiny_folder, tiny_tokenizer, tmp_path, small_buffer):
    data = [written(tmp_path / "a.jsonl.x.jsonl", "a", 60), written(tmp_path / "b.jsonl", "b", 60)]
    rows = StreamedRows(streamed(tiny_folder, tmp_path, data, data_weights=[2.0, 0.5]), tiny_tokenizer)
    names = texts(rows, tiny_tokenizer)
    a, b = ([name for name in names if name.startswith(letter)] for letter in "ab")
    assert len(a) == 120 and {a.count(name) for name in a} == {2}
    assert 15 < len(b) < 45 and len(set(b)) == len(b)
    assert 5 < sum(name.startswith("a") for name in names[:40]) < 40
    rows = StreamedRows(streamed(tiny_folder, tmp_path, data), tiny_tokenizer)
    assert 5 < sum(name.startswith("a") for name in itertools.islice(texts(rows, tiny_tokenizer), 40)) < 35


def test_no_more_is_read_than_the_buffer_needs(tiny_folder, tiny_tokenizer, tmp_path, small_buffer, monkeypatch):
    data = written(tmp_path / "a.jsonl", "a", 3000)
    rows = StreamedRows(streamed(tiny_folder, tmp_path, data), tiny_tokenizer)
    read, before = [], sources.each_example

    def counted(*args):
        for item in before(*args):
            read.append(item)
            yield item

    monkeypatch.setattr(sources, "each_example", counted)
    assert len(list(itertools.islice(rows, 10))) == 10
    assert len(read) <= 16 + 10 + 1


def test_a_run_trains_counts_and_goes_on_as_if_it_had_not_been_stopped(tiny_folder, tmp_path, small_buffer):
    data = written(tmp_path / "a.jsonl", "a", 30)
    for packing in (False, True):
        settings = {"data": data, "streaming": True, "eval_size": 0, "schedule": "constant", "save_steps": 4, "packing": packing}
        settings["max_length"] = 200
        whole = train(
            recipe(tiny_folder, tmp_path, output=str(tmp_path / f"whole{packing}"), max_steps=20, **settings), say=lambda _: None
        )
        part = {"output": str(tmp_path / f"part{packing}"), **settings}
        train(recipe(tiny_folder, tmp_path, max_steps=12, **part), say=lambda _: None)
        resumed = train(recipe(tiny_folder, tmp_path, max_steps=20, resume=True, **part), say=lambda _: None)
        losses = [[row["loss"] for row in run["log"]][-8:] for run in (whole, resumed)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert whole["steps"] == 20 and whole["examples"] >= 30 and whole["data"]["training"]["unusable"] == 0


def test_a_bad_item_stops_the_run_or_is_counted(tiny_folder, tmp_path, small_buffer):
    data = written(tmp_path / "a.jsonl", "a", 150)
    with open(data, "a") as file:
        file.write("\n{oops\n" + json.dumps({"instruction": "x"}))
    settings = {"data": data, "streaming": True, "eval_size": 0, "max_steps": 80}
    with pytest.raises(UserError, match=r"a.jsonl, line 151: malformed JSON"):
        train(recipe(tiny_folder, tmp_path, output=str(tmp_path / "stop"), **settings), say=lambda _: None)
    metrics = train(recipe(tiny_folder, tmp_path, bad_items="skip", **settings), say=lambda _: None)
    assert metrics["steps"] == 80 and metrics["data"]["training"]["unusable"] >= 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": -1}, "set max_steps"),
        ({"eval_size": 2}, "eval_size is 2, which needs all of the data; give eval_data"),
        ({"limit": 5}, "limit is 5, which needs all of the data"),
        ({"data": "LIST"}, "is read whole, which streaming is there to avoid; write it as .jsonl"),
        ({"data": "EMPTY"}, "is empty"),
        ({"data_weights": [1.0, 2.0]}, "data_weights are 2, the sources of data 1"),
    ],
)
def test_what_streaming_cannot_do_is_said_before_the_run(settings, message, tiny_folder, tmp_path):
    written(tmp_path / "a.jsonl", "a", 10)
    (tmp_path / "list.json").write_text(json.dumps([{"instruction": "a", "output": "b"}]))
    (tmp_path / "empty.jsonl").write_text("")
    places = {"LIST": str(tmp_path / "list.json"), "EMPTY": str(tmp_path / "empty.jsonl")}
    whole = {"data": str(tmp_path / "a.jsonl"), "streaming": True, "max_steps": 2, "eval_size": 0}
    whole |= {name: places.get(value, value) if isinstance(value, str) else value for name, value in settings.items()}
    with pytest.raises(UserError, match=message):
        train(recipe(tiny_folder, tmp_path, **whole), say=lambda _: None)
    assert not (tmp_path / "run").exists()
