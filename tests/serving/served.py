"""A model that writes for ever, two adapters of it, a real `doratune serve` over them, and what each request's answer should be."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import torch
from conftest import randomize
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import doratune

SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PATIENCE_S = 600
"""A machine that others use too may be slow; nothing here is timed."""


def make(folder, tokenizer):
    """{name: folder} of the base and two adapters; there is room for an answer that takes minutes."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **ENDS, num_key_value_heads=2, max_position_embeddings=100_000))
    with torch.no_grad():
        model.lm_head.weight[[0, 1, 2]] = 0.0  # scores of 0: an answer hardly ever ends by itself
        model.lm_head.weight[3:] *= 20  # far apart, so that rounding chooses no other token
    folders = {"base": folder / "tiny-base", "one": folder / "one" / "adapter", "two": folder / "two" / "adapter"}
    model.save_pretrained(folders["base"])
    tokenizer.save_pretrained(folders["base"])
    for seed, name in enumerate(("one", "two")):
        model = AutoModelForCausalLM.from_pretrained(folders["base"])
        model.name_or_path = model.config._name_or_path = str(folders["base"])
        targets = ["q_proj", "v_proj", "down_proj", "up_proj"][: 3 + seed]
        doratune.attach(model, doratune.AdapterConfig(rank=4, targets=targets, method=["dora", "lora"][seed]))
        doratune.save(randomize(model, seed=seed, scale=0.5), folders[name])
    return folders


class Alone:
    """The greedy answer to one prompt by transformers alone: no batch, no padding, one adapter attached."""

    def __init__(self, folders):
        self.tokenizer = AutoTokenizer.from_pretrained(folders["base"])
        self.models = {}
        for name, folder in folders.items():
            self.models[name] = AutoModelForCausalLM.from_pretrained(folders["base"]).eval()
            if name != "base":
                doratune.load(self.models[name], folder)
        self.gap = float("inf")
        """The smallest distance between the two best scores of any answer so far, as a share of the best."""

    def chat(self, name, text, new):
        text = self.tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        return self.complete(name, text, new)

    def complete(self, name, text, new):
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        settings = {"max_new_tokens": new, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        out = self.models[name].generate(**ids, **settings, pad_token_id=0, eos_token_id=2)
        best = torch.stack(out.logits).topk(2).values[:, 0]
        self.gap = min(self.gap, ((best[:, 0] - best[:, 1]) / best[:, 0].abs()).min().item())
        return self.tokenizer.decode(out.sequences[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


class Served:
    """The process, until `end`."""

    def __init__(self, folder, *words, **environment):
        self.errors = folder / "errors.txt"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | environment
        command = [sys.executable, "-m", "doratune.cli", "serve", "--port", "0", *map(str, words)]
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        self.said = self.process.stdout.readline()
        match = re.match(r"(http://\S+:(\d+))/v1 serves (.*); Ctrl-C ends", self.said)
        assert match, (self.said, self.errors.read_text()[-2000:])
        self.url, self.port, self.names = match[1], int(match[2]), match[3].split(", ")

    def ask(self, path, body=None, method=None, timeout=PATIENCE_S, **headers):
        """(status, the JSON of the answer, {} of a stream); body: bytes as they are, anything else as JSON."""
        data = body if isinstance(body, bytes | type(None)) else json.dumps(body).encode()
        headers = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                text = answer.read()
                return answer.status, {} if text.startswith(b"data: ") else json.loads(text)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())

    def begin(self, path, body, **headers):
        """A connection on which this request was sent."""
        data = json.dumps(body).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)
        lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", f"Content-Length: {len(data)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + data)
        return connection

    def until(self, **wanted):
        """Wait until /health says so."""
        end = time.monotonic() + PATIENCE_S
        while True:
            state = self.ask("/health")[1]
            if all(state[key] == value for key, value in wanted.items()):
                return
            assert time.monotonic() < end, (wanted, state)
            time.sleep(0.02)

    def end(self, sig=signal.SIGINT):
        """(exit status, the last line on standard error)."""
        self.process.send_signal(sig)
        try:
            status = self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()
            self.process.stdout.close()
        return status, self.errors.read_text().strip().splitlines()[-1]
