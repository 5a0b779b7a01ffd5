"""Training data: formats, what an error says, the length limit, batches, the published sets over HTTP."""

import hashlib
import http.server
import json
import threading

import pytest
import torch
from conftest import tiny_llama

from doratune.data import encoder, instruction, load_items, published
from doratune.data.encode import IGNORED, AnswerCollator, encode_all, fit
from doratune.errors import UserError

ITEM = {"instruction": "Is water wet?", "input": "", "output": "the correct answer is true", "answer": "true"}


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


def test_json_jsonl_slices_and_lists(tmp_path):
    a = write(tmp_path / "a.json", [ITEM] * 3)
    b = write(tmp_path / "b.jsonl", "\n".join([json.dumps(ITEM), "", json.dumps(ITEM)]))
    assert len(load_items(a)[0]) == 3
    assert len(load_items(b)[0]) == 2
    assert len(load_items([a + "[:2]", b])[0]) == 4
    conversation = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    c = write(tmp_path / "c.jsonl", json.dumps(conversation))
    assert load_items(c)[1].name == "chat"
    with pytest.raises(UserError, match="data mixes chat and instruction"):
        load_items([a, c])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", "", "is empty"),
        ("x.json", "[]", "holds no examples"),
        ("x.json", '[\n{"instruction": "a",\n}]', "line 3: malformed JSON"),
        ("x.jsonl", json.dumps(ITEM) + "\n{oops", "line 2: malformed JSON"),
        ("x.json", [ITEM, 5], "item 2 is a whole number"),
        ("x.json", [ITEM, {"instruction": "a"}], "item 2 has no text under 'output'"),
        ("x.json", [{"output": "a"}], "item 1 has no text under 'instruction'"),
        ("x.jsonl", '{"messages": "hi"}', "no list of role and content"),
        ("x.jsonl", '{"messages": [{"role": "user", "content": "hi"}]}', "no message of the role 'assistant'"),
    ],
)
def test_malformed_files(name, content, message, tmp_path):
    with pytest.raises(UserError) as caught:
        load_items(write(tmp_path / name, content))
    assert message in str(caught.value)
    assert name in str(caught.value)


def test_missing_files_and_names(tmp_path):
    with pytest.raises(UserError, match="no such data file"):
        load_items(str(tmp_path / "none.json"))
    with pytest.raises(UserError, match="no such file or known set"):
        load_items("commonsense_17k")
    (tmp_path / "latin.json").write_bytes('[{"instruction": "é"}]'.encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        load_items(str(tmp_path / "latin.json"))


def test_the_loss_is_on_the_answer_only(tiny_tokenizer):
    rows, report = encode_all([ITEM], instruction.encode, tiny_tokenizer, 512)
    (row,) = rows
    answer = [t for t in row["labels"] if t != IGNORED]
    assert tiny_tokenizer.decode(answer) == "the correct answer is true</s>"
    assert row["input_ids"][-len(answer) :] == answer
    assert tiny_tokenizer.decode(row["input_ids"][: -len(answer)]) == instruction.prompt_of(ITEM)
    assert str(report) == "1 examples, none too long"
    whole, _ = encode_all([ITEM], instruction.encode, tiny_tokenizer, 512, on_prompt=True)
    assert whole[0]["labels"] == whole[0]["input_ids"]


def test_too_long_is_cut_on_the_left_or_skipped_and_counted(tiny_tokenizer):
    long = ITEM | {"instruction": "word " * 300}
    giant = ITEM | {"output": "word " * 300}
    rows, report = encode_all([ITEM, long, giant], instruction.encode, tiny_tokenizer, 200)
    assert (report.cut, report.skipped) == (1, 1)
    assert str(report) == "3 examples: 1 cut on the prompt's left, 1 skipped as too long"
    assert [len(row["input_ids"]) for row in rows][1] == 200
    for row in rows:
        assert tiny_tokenizer.decode([t for t in row["labels"] if t != IGNORED]) == "the correct answer is true</s>"
    _, report = encode_all([ITEM, long], instruction.encode, tiny_tokenizer, 200, "skip")
    assert (report.cut, report.skipped) == (0, 1)
    with pytest.raises(UserError, match="all 1 examples are longer"):
        encode_all([giant], instruction.encode, tiny_tokenizer, 50)


def test_the_cut_keeps_a_beginning_of_sequence_token(tiny_tokenizer):
    example = instruction.encode(ITEM, tiny_tokenizer)
    example = example._replace(ids=[1, *example.ids], answer=[False, *example.answer], last_answer=example.last_answer + 1)
    short = fit(example, len(example.ids) - 20, "cut", bos=1)
    assert short.ids[0] == 1
    assert short.ids[1:] == example.ids[21:]
    assert sum(short.answer) == sum(example.answer)


def test_chat_answers_of_every_turn(tiny_tokenizer):
    turns = [("user", "hi"), ("assistant", "one"), ("user", "more"), ("assistant", "two")]
    item = {"messages": [{"role": r, "content": c} for r, c in turns]}
    example = encoder("chat")(item, tiny_tokenizer)
    assert tiny_tokenizer.decode(example.ids) == "[user]hi</s>[assistant]one</s>[user]more</s>[assistant]two</s>"
    learned = [i for i, a in zip(example.ids, example.answer) if a]
    assert tiny_tokenizer.decode(learned) == "one</s>two</s>"
    assert tiny_tokenizer.decode(example.ids[example.last_answer :]) == "two</s>"


def test_batches_pad_left_and_keep_the_last_logits(tiny_tokenizer):
    """The loss of a padded batch is the loss of its examples one by one, whatever is kept of the logits."""
    model = tiny_llama()
    items = [ITEM, ITEM | {"instruction": "Is it so, or is it not so at all?", "output": "the correct answer is false"}]
    rows, _ = encode_all(items, instruction.encode, tiny_tokenizer, 512)
    collate = AnswerCollator(tiny_tokenizer.pad_token_id, model)
    batch = collate(rows)
    assert batch["input_ids"].shape[1] == max(row["length"] for row in rows)
    assert batch["labels"].shape[1] == batch["logits_to_keep"] < 30
    with torch.no_grad():
        together = model(**batch).loss
        single = [model(input_ids=torch.tensor([r["input_ids"]]), labels=torch.tensor([r["labels"]])).loss for r in rows]
    counts = [sum(label != IGNORED for label in row["labels"]) for row in rows]
    expected = sum(loss * n for loss, n in zip(single, counts)) / sum(counts)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)


class Files(http.server.BaseHTTPRequestHandler):
    """Serves what the test puts into `content`; `cut` breaks the transfer off."""

    content: dict = {}
    cut = False
    requests = 0

    def do_GET(self):
        type(self).requests += 1
        body = self.content.get(self.path)
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if self.cut else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    Files.content, Files.cut, Files.requests = {}, False, 0
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_published_sets_are_fetched_once_and_checked(server, tmp_path, monkeypatch):
    body = json.dumps([ITEM] * 3).encode()
    good = published.Published("dataset/boolq/test.json", 3, hashlib.sha256(body).hexdigest())
    monkeypatch.setitem(published.ALL, "boolq", good)
    path = "/dataset/boolq/test.json"

    def fails(message):
        with pytest.raises(UserError) as caught:
            published.fetch("boolq", server, tmp_path)
        assert message in str(caught.value)
        assert not [p for p in tmp_path.rglob("*") if p.is_file()]  # nothing half-written

    fails("404")
    Files.content[path], Files.cut = body, True
    fails("broke off")
    Files.cut = False
    Files.content[path] = b"<html>"
    fails("not the JSON list")
    Files.content[path] = json.dumps([ITEM]).encode()
    fails("1 items, 3 were published")
    Files.content[path] = json.dumps([ITEM | {"answer": "x"}] * 3).encode()
    fails("SHA-256")
    Files.content[path] = body
    fetched = published.fetch("boolq", server, tmp_path)
    assert fetched.read_bytes() == body
    count = Files.requests
    assert published.fetch("boolq", server, tmp_path) == fetched
    assert Files.requests == count


def test_no_network_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be fetched") as caught:
        published.fetch("commonsense_170k", "http://127.0.0.1:9/", tmp_path)
    assert "put the file at" in str(caught.value)
    with pytest.raises(UserError, match="did you mean 'boolq'"):
        published.fetch("bolq", "http://127.0.0.1:9/", tmp_path)


def test_the_known_checksums_are_those_of_the_published_files(shared_data):
    for name, entry in published.TEST_SETS.items():
        path = shared_data / "commonsense" / name / "test.json"
        if path.is_file():
            assert hashlib.sha256(path.read_bytes()).hexdigest() == entry.sha256
            assert len(json.loads(path.read_text())) == entry.items
