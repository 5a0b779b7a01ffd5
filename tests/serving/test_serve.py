"""doratune serve, a real process: OpenAI's own client, adapters at once, a hundred clients, clients that leave, hostile ones."""

import json
import os
import random
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from served import PATIENCE_S, Alone, Served, make

NEVER = {"model": "one", "prompt": "true", "temperature": 0, "max_tokens": 60_000}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_tokenizer):
    return make(tmp_path_factory.mktemp("served"), tiny_tokenizer)


@pytest.fixture(scope="module")
def alone(folders):
    return Alone(folders)


@pytest.fixture(scope="module")
def server(folders, tmp_path_factory):
    words = ["--adapter", folders["one"], "--adapter", folders["two"], "--batch_size", 8, "--max_queue", 120]
    served = Served(tmp_path_factory.mktemp("log"), *words, "--max_new_tokens", 60_000, "--max_body_kib", 256)
    yield served
    status, line = served.end()
    assert (status, line) == (130, "doratune serve: interrupted")
    assert served.errors.read_text().splitlines() == [line], "what its packages say of requests is no user's"


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as one:
        yield one


def said(client, name, text, **more):
    settings = {"temperature": 0, "max_tokens": 12} | more
    answer = client.chat.completions.create(model=name, messages=[{"role": "user", "content": text}], **settings)
    return answer.choices[0].message.content


def test_models(client, server):
    assert server.names == [model.id for model in client.models.list()] == ["tiny-base", "one", "two"]
    assert client.models.retrieve("two").id == "two"
    with pytest.raises(openai.NotFoundError, match="no model is named 'three'"):
        client.models.retrieve("three")


def test_each_name_is_its_own_model(client, alone):
    texts = {name: said(client, served, "the answer") for name, served in (("base", "tiny-base"), ("one", "one"), ("two", "two"))}
    assert texts == {name: alone.chat(name, "the answer", 12) for name in texts} and len(set(texts.values())) == 3
    assert said(client, "base", "the answer") == texts["base"]


def test_two_adapters_at_once_streaming(client, alone):
    """Both streams are open and written together; each is its adapter's own text."""
    both = threading.Barrier(2)

    def stream(name):
        events = client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": "true"}], temperature=0, max_tokens=60, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        both.wait(PATIENCE_S)
        chunks = list(events)
        assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length"
        assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 60
        assert all(chunk.usage is None for chunk in chunks[:-1])
        return [chunk.choices[0].delta.content for chunk in chunks[:-1] if chunk.choices[0].delta.content]

    with ThreadPoolExecutor(2) as pool:
        pieces = dict(zip(("one", "two"), pool.map(stream, ("one", "two"))))
    for name in ("one", "two"):
        assert "".join(pieces[name]) == alone.chat(name, "true", 60) and len(pieces[name]) > 10


def test_completions(client, alone):
    whole = client.completions.create(model="two", prompt="the answer is", temperature=0, max_tokens=9)
    assert whole.choices[0].text == alone.complete("two", "the answer is", 9) and whole.choices[0].finish_reason == "length"
    ids = alone.tokenizer("the answer is")["input_ids"]
    assert whole.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}) == {
        "prompt_tokens": len(ids), "completion_tokens": 9, "total_tokens": len(ids) + 9,
    }  # fmt: skip
    several = client.completions.create(model="one", prompt=["true", "false", "the"], temperature=0, max_tokens=5, n=2)
    assert [choice.index for choice in several.choices] == list(range(6))
    assert [choice.text for choice in several.choices] == [
        alone.complete("one", t, 5) for t in ("true", "false", "the") for _ in "ab"
    ]
    tokens = client.completions.create(model="two", prompt=ids, temperature=0)
    assert tokens.choices[0].text == alone.complete("two", "the answer is", 16)  # the length of OpenAI's completions
    parts = list(client.completions.create(model="two", prompt="the answer is", temperature=0, max_tokens=9, stream=True))
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text


def test_stops_end_a_text(client, alone):
    text = alone.chat("one", "the answer", 40)
    start = next(i for i in range(8, 30) if text[i : i + 2].isascii() and text.find(text[i : i + 2]) == i)
    stop = text[start : start + 2]
    for more in ({"stop": stop}, {"stop": ["never there", stop, stop + "?"]}):
        answer = client.chat.completions.create(
            model="one", messages=[{"role": "user", "content": "the answer"}], temperature=0, max_tokens=40, **more
        )
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (text[:start], "stop")
        assert answer.usage.completion_tokens < 40
    assert said(client, "one", "the answer", max_tokens=40, stop=["never there"]) == text


def test_a_seed_repeats_an_answer_in_any_company(client):
    def drawn(seed, **more):
        settings = {"temperature": 1.5, "top_p": 0.9, "max_tokens": 20, "seed": seed}
        return said(client, "two", "true", **settings | more)

    quiet = drawn(7)
    with ThreadPoolExecutor(8) as pool:
        crowd = list(pool.map(drawn, [7, 1, 2, 7, 3, 4, 5, 7]))
    assert crowd[0] == crowd[3] == crowd[7] == quiet and len(set(crowd)) > 4
    assert drawn(None) != drawn(None)


def test_a_conversation_and_its_forms(client, alone):
    messages = [
        {"role": "developer", "content": "the answer"},
        {"role": "user", "content": [{"type": "text", "text": "tr"}, {"type": "text", "text": "ue"}]},
    ]
    answer = client.chat.completions.create(model="one", messages=messages, temperature=0, max_completion_tokens=7)
    prompt = "[system]the answer</s>[user]true</s>[assistant]"
    assert answer.choices[0].message.content == alone.complete("one", prompt, 7)
    messages += [answer.choices[0].message, {"role": "user", "content": "the"}]  # the client's own object, as users do
    second = client.chat.completions.create(model="one", messages=messages, temperature=0, max_completion_tokens=7)
    prompt += f"{answer.choices[0].message.content}</s>[user]the</s>[assistant]"
    assert second.choices[0].message.content == alone.complete("one", prompt, 7)


def test_a_hundred_at_once(client, alone):
    """Mixed adapters, lengths, endpoints, streaming and not, over eight rows: none is lost, each is its own single run."""
    generator = random.Random(0)
    words = ["the", "correct", "answer", "is", "true", "false", "option1", "ending4"]
    asked = []
    for i in range(100):
        text = " ".join(generator.choices(words, k=generator.randint(1, 30)))
        asked.append((generator.choice(["base", "one", "two"]), text, generator.randint(1, 24), i % 3 == 0, i % 2 == 0))
    start = threading.Barrier(100)

    def ask(request):
        name, text, new, streaming, chat = request
        start.wait(PATIENCE_S)
        way = client.chat.completions.create if chat else client.completions.create
        prompt = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        answer = way(model=name, temperature=0, max_tokens=new, stream=streaming, **prompt)
        if not streaming:
            return answer.choices[0].message.content if chat else answer.choices[0].text
        return "".join((chunk.choices[0].delta.content or "") if chat else chunk.choices[0].text for chunk in answer)

    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(ask, asked))
    for (name, text, new, _, chat), answer in zip(asked, answers, strict=True):
        assert answer == (alone.chat if chat else alone.complete)(name, text, new)
    assert alone.gap > 2e-5  # no answer hangs on fp32's rounding


def test_a_client_that_leaves_in_mid_stream(server, client, alone):
    """Its row ends, which alone would take minutes; the others' answers are whole."""
    connections = [server.begin("/v1/completions", NEVER | {"stream": True, "model": name}) for name in ("one", "two", "one")]
    for connection in connections:
        assert connection.recv(15).startswith(b"HTTP/1.1 200")
    server.until(running=3)
    connections.pop().close()
    server.until(running=2)
    assert said(client, "two", "true") == alone.chat("two", "true", 12)
    for connection in connections:
        assert connection.recv(1000)
        connection.close()
    server.until(running=0, waiting=0)


def test_clients_that_leave_without_an_answer(server, client, alone):
    """Not streaming, and while they wait for a row."""
    connections = [server.begin("/v1/completions", NEVER) for _ in range(11)]
    server.until(running=8, waiting=3)
    for connection in connections[8:]:
        connection.close()
    server.until(running=8, waiting=0)
    for connection in connections:
        connection.close()
    server.until(running=0)
    assert said(client, "one", "true") == alone.chat("one", "true", 12)


GOOD = {"model": "one", "messages": [{"role": "user", "content": "true"}], "max_tokens": 2}
WRONG = {
    "no JSON": (b"{", 400, "JSON"),
    "no UTF-8": (b'{"model": "\xff\xfe"}', 400, "JSON"),
    "nothing": (b"", 400, "JSON"),
    "no object": ([GOOD], 400, "no JSON object"),
    "a bottomless list": (b"[" * 20_000, 400, "recursion"),
    "half a character": (json.dumps(GOOD).encode().replace(b'"true"', b'"\\ud800"'), 400, "hex escape"),
    "too many bytes": (json.dumps(GOOD | {"user": "x" * 270_000}).encode(), 413, "more than 262144 bytes"),
    "far too many bytes": (b" " * 2_000_000, 413, "more than 262144 bytes"),
    "no model": ({"messages": GOOD["messages"]}, 400, "model: Field required"),
    "an adapter that is not loaded": (GOOD | {"model": "onne"}, 404, "did you mean 'one'"),
    "a path for a name": (GOOD | {"model": "../../etc/passwd"}, 404, "no model is named"),
    "no messages": (GOOD | {"messages": []}, 400, "messages"),
    "messages that are text": (GOOD | {"messages": "true"}, 400, "messages"),
    "an unknown role": (GOOD | {"messages": [{"role": "king", "content": "x"}]}, 400, "messages[0].role"),
    "an image": (
        GOOD | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        400,
        "messages[0].content[0].type",
    ),
    "a number as text": (GOOD | {"max_tokens": "2"}, 400, "max_tokens: Input should be a valid integer"),
    "no tokens": (GOOD | {"max_tokens": 0}, 400, "max_tokens"),
    "too many tokens": (GOOD | {"max_tokens": 60_001}, 400, "at most 60000"),
    "two lengths": (GOOD | {"max_completion_tokens": 3}, 400, "differ"),
    "a cold temperature": (GOOD | {"temperature": -1}, 400, "temperature"),
    "no number": (b'{"model": "one", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400, "temperature"),
    "no probability": (GOOD | {"top_p": 0}, 400, "top_p"),
    "an empty stop": (GOOD | {"stop": ""}, 400, "stop"),
    "stops in plenty": (GOOD | {"stop": ["x"] * 17}, 400, "stop"),
    "a seed without end": (json.dumps(GOOD).encode()[:-1] + b', "seed": ' + b"9" * 400 + b"}", 400, "seed"),
    "many choices": (GOOD | {"n": 17}, 400, "n: "),
    "what is not supported": (GOOD | {"logprobs": True}, 400, "logprobs is not supported here"),
    "a penalty": (GOOD | {"frequency_penalty": 0.5}, 400, "frequency_penalty is not supported"),
    "tools": (GOOD | {"tools": [{"type": "function"}]}, 400, "tools is not supported"),
    "a typing error": (GOOD | {"temprature": 1}, 400, "did you mean 'temperature'"),
    "options of no stream": (GOOD | {"stream_options": {"include_usages": True}}, 400, "stream_options.include_usages"),
}
COMPLETIONS = {
    "an empty prompt": ("", "the prompt is empty"),
    "no prompts": ([], "the prompt is empty"),
    "one empty prompt": (["true", ""], "the prompt is empty"),
    "a token id too many": ([5, 300], "token id 300 is none of the model's 300"),
    "a negative token id": ([[-1]], "token id -1"),
    "ids and texts": ([5, "true"], "prompt"),
    "an object": ({"text": "x"}, "prompt"),
    "more answers than can wait": (["true"] * 121, "121 answers are asked for"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests(case, server):
    body, status, words = WRONG[case]
    got, answer = server.ask("/v1/chat/completions", body)
    assert got == status and words in answer["error"]["message"] and "\n" not in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert server.ask("/health")[1] == {"status": "ok", "running": 0, "waiting": 0}


@pytest.mark.parametrize("case", COMPLETIONS)
def test_wrong_completions(case, server):
    prompt, words = COMPLETIONS[case]
    got, answer = server.ask("/v1/completions", {"model": "one", "prompt": prompt})
    assert got == 400 and words in answer["error"]["message"]


def test_prompts_that_are_too_long(server, client):
    with pytest.raises(openai.BadRequestError, match="more than the model's 100000") as caught:
        client.completions.create(model="one", prompt=[5] * 25_000 + [6] * 16_000, max_tokens=60_000)
    assert caught.value.code == "context_length_exceeded"


def test_wrong_ways(server):
    assert server.ask("/v1/chat/completions", method="GET")[0] == 405
    assert server.ask("/v1/embeddings", GOOD)[0] == server.ask("/")[0] == server.ask("/v1/models/../../x")[0] == 404
    assert server.ask("/v1/chat/completions", GOOD, content_type="text/plain")[0] == 415  # what a web page may send anywhere
    status, answer = server.ask("/v1/models", Host="evil.example:80")
    assert status == 403 and answer["error"]["code"] == "wrong_host"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
        assert b" 400 " in connection.recv(100)
    assert server.ask("/v1/models", Connection="Upgrade", Upgrade="websocket")[0] == 200
    assert server.ask("/v1/chat/completions", GOOD)[0] == 200


def test_hostile_requests_leave_it_up(server, client, alone):
    """Mutated bodies, bytes at random, bodies that never end, dropped connections: an answer in JSON below 500, or none."""
    generator = random.Random(1)
    pool = [None, True, -1, 0, 1, 2, 1e308, "", "x", "\u0000", "one", [], [[]], {}, {"type": "text"}, [1, "x"], 2**70, "🙂" * 50]
    for _ in range(150):
        body = json.loads(json.dumps(GOOD | {"stop": ["x"], "n": 1, "stream": False, "seed": 1}))
        for _ in range(generator.randint(1, 3)):
            place = generator.choice([body, body["messages"][0]]) if body.get("messages") == GOOD["messages"] else body
            key = generator.choice([*place, "extra"])
            if key != "max_tokens":  # else it would be answered, at length
                place[key] = generator.choice(pool)
        data = json.dumps(body).encode()
        if generator.random() < 0.3:
            data = bytearray(data)
            for _ in range(3):
                data[generator.randrange(len(data))] = generator.randrange(256)
            data = bytes(data) if b'"max_tokens": 2' in data else b"\x00"
        status, answer = server.ask("/v1/chat/completions", data)
        assert status == 200 or (400 <= status < 500 and answer["error"]["message"]), (data, status, answer)
    half = server.begin("/v1/completions", GOOD, **{"X-Long": "x" * 1000})
    half.close()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        )
    assert said(client, "two", "true") == alone.chat("two", "true", 12)
    server.until(running=0, waiting=0)


def test_a_key_a_full_queue_and_another_end(folders, tmp_path, alone):
    """Listening on every address, with a key; one row, two that wait; SIGTERM in mid-stream."""
    words = ["--adapter", f"my={folders['one']}", "--host", "0.0.0.0", "--batch_size", 1, "--max_queue", 2]
    words += ["--max_new_tokens", 60_000, "--template", "plain"]
    server = Served(tmp_path, *words, DORATUNE_API_KEY="sesame")
    server.url = f"http://127.0.0.1:{server.port}"
    for wrong in ({}, {"Authorization": "Bearer x"}, {"Authorization": "Basic sesame"}, {"Authorization": "Bearer s\u00e9"}):
        status, answer = server.ask("/v1/models", **wrong)
        assert status == 401 and answer["error"]["code"] == "invalid_api_key"
    assert server.ask("/health")[0] == 200
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()
    key = {"Authorization": "Bearer sesame"}
    assert said_by(server, key, "true") == alone.complete("one", "true", 5)
    never = NEVER | {"model": "my", "stream": True}
    connections = [server.begin("/v1/completions", never, **key) for _ in range(3)]
    server.until(running=1, waiting=2)
    status, answer = server.ask("/v1/completions", never, **key)
    assert status == 429 and answer["error"]["code"] == "queue_full"
    assert connections[0].recv(15).startswith(b"HTTP/1.1 200")
    assert server.end(signal.SIGTERM) == (143, "doratune serve: terminated")
    assert "Traceback" not in server.errors.read_text()
    for connection in connections:
        connection.close()


def said_by(server, key, text):
    """The answer of a server whose chats are plain text."""
    body = {"model": "my", "messages": [{"role": "user", "content": text}], "max_tokens": 5, "temperature": 0}
    two = {**body, "messages": body["messages"] * 2}
    assert "takes one message" in server.ask("/v1/chat/completions", two, **key)[1]["error"]["message"]
    return server.ask("/v1/chat/completions", body, **key)[1]["choices"][0]["message"]["content"]


def refusal(capsys, *words):
    from doratune.cli.main import main

    assert main(["serve", *map(str, words)]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_bad_settings(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("DORATUNE_API_KEY", raising=False)
    model = ("--model", folders["base"])
    assert "neither model nor adapter" in refusal(capsys, "--port", 0)
    assert "DORATUNE_API_KEY" in refusal(capsys, *model, "--host", "0.0.0.0")
    assert "DORATUNE_API_KEY" in refusal(capsys, *model, "--host", "::")
    assert "host 'nowhere.invalid' is not known" in refusal(capsys, *model, "--host", "nowhere.invalid")
    assert "port is 70000" in refusal(capsys, *model, "--port", 70000)
    assert "unknown setting --api_key" in refusal(capsys, *model, "--api_key", "secret")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}: Address already in use; give another --port" in refusal(capsys, *model, "--port", port)
    for key in ("", " ", "two\nlines", "schlüssel"):
        monkeypatch.setenv("DORATUNE_API_KEY", key)
        assert "DORATUNE_API_KEY is empty" in refusal(capsys, *model, "--port", 0)
    monkeypatch.delenv("DORATUNE_API_KEY")
    assert "nothing is not a folder" in refusal(capsys, *model, "--port", 0, "--adapter", tmp_path / "nothing")
    named = f"tiny-base={folders['one']}"
    assert "adapter 'tiny-base' has the base model's name" in refusal(capsys, *model, "--port", 0, "--adapter", named)
    assert os.environ.get("DORATUNE_API_KEY") is None
