"""Requests that strangers send to `doratune serve`: bytes into the application itself, over a model and an adapter that run.

The first line is a method and a path, the next ones are headers, after an empty line comes the body, as HTTP has it. Every answer
is a status below 500 with JSON, or a stream.
"""

import functools
import json
import re
import tempfile
from pathlib import Path

from conftest import randomize, small_tokenizer, tiny_llama

import doratune

TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


@functools.cache
def client():
    """A client of the application; the engine's thread ends with the process."""
    from starlette.testclient import TestClient

    from doratune.generation.adapters import NamedAdapters
    from doratune.serving.app import Service
    from doratune.serving.engine import Engine
    from doratune.serving.guard import Guard
    from doratune.serving.prompts import Lengths, Prompts

    folder = Path(tempfile.mkdtemp(prefix="served_"))
    tokenizer, model = small_tokenizer(), tiny_llama()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model.name_or_path = model.config._name_or_path = str(folder / "base")
    doratune.attach(model, doratune.AdapterConfig(rank=2, targets=["q_proj"]))
    doratune.save(randomize(model), folder / "one")
    adapters = NamedAdapters(str(folder / "base"), [f"one={folder / 'one'}"], "float32", "none", False)
    adapters.load_all()
    prompts = Prompts(adapters.tokenizer, 300, "auto")
    guard = Guard(None, frozenset({"testserver", "localhost"}), 4096)
    names = adapters.inside | {"base": None}
    service = Service(Engine(adapters, 4, 8), prompts, Lengths(256, 64, 4), guard, names, ["base", "one"])
    service.engine.start()
    return TestClient(service.app())


def asked(data: bytes) -> None:
    """Send the request; what is no HTTP at all is left out."""
    head, _, body = data.partition(b"\n\n")
    first, *lines = head.decode("latin-1").split("\n")
    method, _, path = first.partition(" ")
    headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    headers = [(name, value) for name, value in headers if TOKEN.fullmatch(name) and _plain(value)]
    if not (TOKEN.fullmatch(method) and path.startswith("/") and _plain(path) and "//" not in path):
        return
    answer = client().request(method, path, content=body, headers=headers)
    assert answer.status_code < 500, answer.text
    if answer.content and not answer.headers["content-type"].startswith("text/event-stream"):
        json.loads(answer.text)


def _plain(text: str) -> bool:
    return text.isascii() and text.isprintable()


def request(body, path="/v1/chat/completions", *headers) -> bytes:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return "\n".join([f"POST {path}", "content-type: application/json", *headers, "", ""]).encode() + text


CHAT = {"model": "one", "messages": [{"role": "user", "content": "a cat"}], "max_tokens": 2}
COMPLETION = {"model": "base", "prompt": "a cat", "max_tokens": 2}
REQUESTS = [
    request(CHAT),
    request(CHAT | {"stream": True}),
    request(CHAT | {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "stop": ["a", ""]}),
    request(CHAT | {"temperature": 1e308, "top_p": 0.0, "seed": 2**70}),
    request(CHAT | {"n": 10**9}),
    request(CHAT | {"max_tokens": -1}),
    request(CHAT | {"messages": [{"role": "tool", "content": None}]}),
    request(CHAT | {"model": "../../etc"}),
    request(COMPLETION, "/v1/completions"),
    request(COMPLETION | {"prompt": [[1, 2], [3]]}, "/v1/completions"),
    request(COMPLETION | {"prompt": [-1, 10**12]}, "/v1/completions"),
    request(COMPLETION | {"prompt": []}, "/v1/completions"),
    request(b"[" * 4000),
    request(b'{"model": "one", "model": "base"}'),
    request(b"\xff\xfe"),
    request(b"x" * 5000),
    request(CHAT, "/v1/chat/completions", "host: evil.example"),
    request(CHAT, "/v1/chat/completions", "origin: https://evil.example"),
    request(CHAT, "/v1/chat/completions", "content-encoding: gzip"),
    b"GET /v1/models\n\n",
    b"GET /v1/models/one%2F..%00\n\n",
    b"DELETE /v1/models/one\n\n",
    b"GET /health\n\n",
]
