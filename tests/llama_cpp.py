"""llama.cpp itself, out of the wheel `xllamacpp`: a server in a process of its own, asked over loopback."""

import json
import os
import subprocess
import sys
import urllib.request


def ask(file, *requests) -> list[dict]:
    """Answers to (path, body) requests, in order."""
    command = [sys.executable, __file__, str(file)]
    run = subprocess.run(command, input=json.dumps(requests), capture_output=True, text=True, timeout=600)
    lines = [line for line in run.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert lines, run.stdout[-500:] + run.stderr[-3000:]
    return json.loads(lines[-1].removeprefix("ANSWERS "))


def distribution(answer: dict, size: int) -> list[float]:
    """Log probabilities of the first new token, by id."""
    entries = answer["completion_probabilities"][0]["top_logprobs"]
    values = {entry["id"]: entry["logprob"] for entry in entries}
    return [values[i] for i in range(size)]


def serve(file: str, requests) -> list[dict]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = file, 512, 1
    params.cpuparams.n_threads, params.warmup, params.verbosity = 1, False, 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    answers = []
    for path, body in requests:
        url, kind = server.listening_address + path, {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), kind)) as answer:
            answers.append(json.load(answer))
    return answers


if __name__ == "__main__":
    print("\nANSWERS " + json.dumps(serve(sys.argv[1], json.load(sys.stdin))), flush=True)
    os._exit(0)  # the server's threads have no end of their own
