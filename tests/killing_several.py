"""Runs of two processes, of which one or both are killed (SIGKILL) at random moments while they save.

`python tests/killing_several.py COUNT FOLDER` prints one JSON line of figures; DDP and FSDP2 in turn.
"""

import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

from killing import command_here, fork, leftovers, prepare, read_folder, warm
from safetensors.torch import load_file


def together(words, log):
    """The ids of two processes of one run, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def ranked(rank):
        os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return command_here(words)

    return [fork(lambda rank=rank: ranked(rank), log) for rank in range(2)]


def ended(children, seconds):
    """Exit statuses of all that end in this time; the others are killed: None."""
    deadline, statuses = time.monotonic() + seconds, {}
    while len(statuses) < len(children) and time.monotonic() < deadline:
        for child in children:
            if child not in statuses and (found := os.waitpid(child, os.WNOHANG))[0]:
                statuses[child] = os.waitstatus_to_exitcode(found[1])
        time.sleep(0.005)
    for child in children:
        if child not in statuses:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return [statuses.get(child) for child in children]


def difference(one, other):
    """The largest of all numbers of two adapters."""
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    return max((a[key] - b[key]).abs().max().item() for key in a)


def several(count, place):
    """Kills of one or both of two processes while they save after every step; some are resumed to their end."""
    from doratune.training.checkpoints import damage, last_checkpoint

    model, data = prepare(place)
    log = str(place / "log")
    words = ["train", "--model", str(model), "--data", str(data), "--rank", "4", "--lr", "5e-3", "--dtype", "float32"]
    words += ["--batch_size", "4", "--max_steps", "16", "--save_steps", "1", "--keep_checkpoints", "2", "--log_steps", "1"]
    words += ["--tensorboard", "false", "--targets", "[q_proj, v_proj]"]
    warm([*words, "--output", str(place / "warm")])
    engines = {"none": place / "whole", "shard": place / "sharded"}
    for engine, whole in engines.items():
        assert ended(together([*words, "--fsdp", engine, "--output", str(whole)], log), 120) == [0, 0], Path(log).read_text()[
            -3000:
        ]
    figures = dict.fromkeys(
        ("kills", "not_begun", "ended_before", "saving", "torn", "none", "leftovers", "resumed", "difference"), 0
    )
    run = place / "run"
    for number in range(count):
        os.system(f"rm -rf {run}")
        engine = list(engines)[number % 2]
        mine = [*words, "--fsdp", engine, "--output", str(run)]
        children = together([*mine, "--overwrite"], log)
        deadline = time.monotonic() + 600
        while not (run / "checkpoint-1").exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        if not (run / "checkpoint-1").exists():
            ended(children, 0)
            figures["not_begun"] += 1
            continue
        time.sleep(random.uniform(0.0, 1.5))
        victims = random.choice((children[:1], children[1:], children))
        for child in victims:
            os.kill(child, signal.SIGKILL)
        figures["saving"] += any(".checkpoint-" in path.name for path in run.iterdir())
        statuses = ended(children, 0.3)
        figures["ended_before" if statuses == [0, 0] else "kills"] += 1
        figures["torn"] += sum(damage(path) is not None for path in run.glob("checkpoint-*"))
        for path in run.glob("checkpoint-*"):
            read_folder(path)
        figures["none"] += last_checkpoint(run) is None
        if number % 10 in (0, 5) and statuses != [0, 0]:
            assert ended(together([*mine, "--resume"], log), 120) == [0, 0], Path(log).read_text()[-3000:]
            figures["resumed"] += 1
            figures["difference"] = max(figures["difference"], difference(run / "adapter", engines[engine] / "adapter"))
            figures["leftovers"] += bool(leftovers(run))
        print(json.dumps(figures), file=sys.stderr, flush=True)
    return figures


if __name__ == "__main__":
    place = Path(sys.argv[2])
    place.mkdir(parents=True, exist_ok=True)
    random.seed(os.environ.get("SEED", "0"))
    print(json.dumps(several(int(sys.argv[1]), place)))
