"""Processes that are killed (SIGKILL) at random moments, and what they leave behind.

`python tests/killing.py MODE COUNT FOLDER` prints one JSON line of figures. The parent imports everything once and forks a child
for each kill, so that a kill costs the work and not the imports. MODE: swap, renames (a file system that cannot exchange two
names), files (a folder that cannot be renamed), train, merge, compare.
"""

import json
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

import doratune
from doratune.checkpoint.adapter import read_folder
from doratune.support import folders

RANKS = (2, 3, 4)
"""Generation k has rank RANKS[k % 3], alpha 10 + k % 3, and k in all of its tensors: no two neighbours fit together."""


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 40))


def settings(k):
    return doratune.AdapterConfig(rank=RANKS[k % 3], alpha=10.0 + k % 3, targets=["0", "1"])


def save(models, k, folder):
    """Write generation k."""
    model = models[k % 3]
    with torch.no_grad():
        for _, layer in doratune.adapters(model):
            for p in (layer.lora_A, layer.lora_B, layer.magnitude):
                p.fill_(k)
    doratune.save(model, folder)


def generation_of(folder):
    """The generation that a folder holds; fails where it holds parts of two."""
    config, raw, tensors = read_folder(folder)
    values = {float(v) for t in tensors.values() for v in t.unique()}
    k = int(min(values))
    whole = values == {float(k)} and (config.rank, config.alpha, raw["r"]) == (RANKS[k % 3], 10.0 + k % 3, RANKS[k % 3])
    if not whole:
        raise AssertionError(f"{folder} mixes generations: {values}, rank {config.rank}, alpha {config.alpha}")
    doratune.load(base(), folder)
    return k


def fork(work, log=os.devnull):
    """The id of a child that does the work."""
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os._exit(work() or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(70)


def kill_after(child, seconds, seen=lambda: True):
    """Kill the child so long after something was seen; its status if it ended before, else None."""
    deadline = None
    while deadline is None or time.monotonic() < deadline:
        deadline = time.monotonic() + seconds if deadline is None and seen() else deadline
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def saves(mode, count, place):
    """Kills in a loop that saves over one adapter folder, which holds other files too."""
    folder = place / "home" / "adapter"
    if mode == "renames":
        folders.exchange = lambda one, other: False
    models = [doratune.attach(base(), settings(k)) for k in range(3)]
    save(models, 1, folder)
    (folder / "optimizer.pt").write_text("theirs")
    (folder / "notes").mkdir()
    (folder / "notes" / "thesis.txt").write_text("theirs")
    names, k = sorted(os.listdir(folder)), 1
    figures = dict.fromkeys(("kills", "torn", "mixed", "lost", "leftovers", "refused"), 0)

    def loop(start):
        if mode == "files":
            os.chdir(folder)
        while True:
            start += 1
            save(models, start, Path(".") if mode == "files" else folder)

    for _ in range(count):
        kill_after(fork(lambda start=k: loop(start)), random.uniform(0.002, 0.12))
        figures["kills"] += 1
        try:
            now = generation_of(folder)
            figures["lost"] += now < k
            k = now
        except doratune.UserError as error:
            figures["refused" if mode == "files" and "missing" in str(error) else "torn"] += 1
        except AssertionError:
            figures["mixed"] += 1
        theirs = [(folder / "optimizer.pt"), (folder / "notes" / "thesis.txt")]
        figures["lost"] += any(not path.is_file() or path.read_text() != "theirs" for path in theirs)
        k += 1
        save(models, k, folder)
        figures["leftovers"] += sorted(os.listdir(folder)) != names or os.listdir(folder.parent) != ["adapter"]
        figures["torn"] += generation_of(folder) != k
    return figures


def leftovers(place):
    """Names that a finished command must not leave."""
    return [str(p) for p in place.rglob("*") if ".doratune-" in p.name or p.name in (".replaced",) or p.name.endswith(".before")]


def tensors_of(folder):
    from safetensors.torch import load_file

    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def same(one, other):
    a, b = tensors_of(one), tensors_of(other)
    return a.keys() == b.keys() and all(
        a[file].keys() == b[file].keys() and all(torch.equal(t, b[file][key]) for key, t in a[file].items()) for file in a
    )


def command_here(words):
    from doratune.cli.main import main

    torch.set_num_threads(1)
    return main(words)


def command(words, log):
    return fork(lambda: command_here(words), log)


def prepare(place):
    """(model folder, data file): a tiny Llama with its tokenizer, and 32 examples."""
    from conftest import small_tokenizer, tiny_llama

    model, data = place / "base", place / "data.json"
    tiny_llama().save_pretrained(model)
    small_tokenizer().save_pretrained(model)
    items = [{"instruction": f"Is {i} even? {'really ' * (i % 5)}", "input": "", "output": str(i % 2 == 0)} for i in range(32)]
    data.write_text(json.dumps(items))
    return model, data


def warm(words):
    """Imports, model and adapter of `doratune train`, in the parent, so that the children need no imports. No step: threads do not
    survive a fork."""
    import transformers.trainer

    from doratune.cli import merge, train  # noqa: F401
    from doratune.cli.arguments import parse
    from doratune.training.methods import method_of
    from doratune.training.recipe import TrainRecipe
    from doratune.training.train import build_trainer  # noqa: F401

    torch.set_num_threads(1)
    assert transformers.trainer.Trainer
    method = method_of(parse(TrainRecipe, words[1:], "train", "")[0])
    method.prepare(method.load())


def trained(run):
    metrics = json.loads((run / "metrics.json").read_text())
    return {key: metrics[key] for key in ("steps", "tokens", "final_loss", "magnitude_moved")}, [
        row["loss"] for row in metrics["log"] if "loss" in row
    ]


def finish(words, log):
    """Run to the end; the exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(command(words, log), 0)[1])


def begun(run, old, name):
    """Has the new run begun to write this?"""
    new = old is None or (run / ".replaced").is_dir()
    return new and (any(run.glob(f".{name}.*")) or (run / name).exists())


def train(count, place):
    """Kills in `doratune train`, into a new folder or over an old run, each resumed (or begun again) to its end."""
    from doratune.training.train import last_checkpoint

    model, data = prepare(place)
    log = str(place / "log")
    words = ["train", "--model", str(model), "--data", str(data), "--rank", "4", "--lr", "5e-3", "--dtype", "float32"]
    words += ["--batch_size", "4", "--epochs", "2", "--save_steps", "3", "--keep_checkpoints", "2", "--log_steps", "1"]
    words += ["--tensorboard", "false", "--targets", "[q_proj, v_proj]"]
    old, whole, run = place / "old", place / "whole", place / "run"
    warm([*words, "--output", str(place / "warm")])
    assert finish([*words, "--output", str(old), "--rank", "2", "--max_steps", "3"], log) == 0
    assert finish([*words, "--output", str(whole)], log) == 0
    figures = dict.fromkeys(("kills", "ended_before", "torn", "mixed", "lost", "leftovers", "resumed", "again", "different"), 0)
    for number in range(count):
        os.system(f"rm -rf {run}")
        over = number % 2 == 1
        if over:
            os.system(f"cp -r {old} {run}")
        mine = [*words, "--output", str(run)]
        moment = random.choice(("recipe.yaml", "checkpoint-3", "checkpoint-6", "checkpoint-12", "checkpoint-16", "adapter"))
        child = command([*mine, "--overwrite"], log)
        status = kill_after(child, random.uniform(0.0, 0.25), partial(begun, run, old if over else None, moment))
        figures["kills" if status is None else "ended_before"] += 1
        if over and not (run / "metrics.json").is_file():
            figures["lost"] += not (same(run / ".replaced" / "adapter", old / "adapter") or same(run / "adapter", old / "adapter"))
        if (run / "adapter").is_dir() and (run / "recipe.yaml").is_file():
            import yaml

            rank = yaml.safe_load((run / "recipe.yaml").read_text())["rank"]
            figures["mixed"] += read_folder(run / "adapter")[0].rank != rank
        of_the_old = over and not (run / ".replaced" / "recipe.yaml").is_file()
        checkpoint = None if of_the_old else last_checkpoint(run)
        for path in run.glob("checkpoint-*"):
            try:
                read_folder(path)
            except doratune.UserError:
                figures["torn"] += 1
        if status is None:
            figures["resumed" if checkpoint else "again"] += 1
            assert finish([*mine, "--resume" if checkpoint else "--overwrite"], log) == 0, Path(log).read_text()[-3000:]
        figures["different"] += not same(run / "adapter", whole / "adapter") or trained(run) != trained(whole)
        figures["leftovers"] += bool(leftovers(run))
    return figures


def merge(count, place):
    """Kills in `doratune merge --overwrite` over a folder that holds another merged model, each done again."""
    model, data = prepare(place)
    log, output = str(place / "log"), place / "home" / "merged"
    for rank in (2, 4):
        words = ["train", "--model", str(model), "--data", str(data), "--rank", str(rank), "--lr", "5e-2", "--max_steps", "2"]
        words += ["--dtype", "float32", "--tensorboard", "false", "--output", str(place / f"run{rank}")]
        if rank == 2:
            warm(words)
        assert finish(words, log) == 0
        out = ["merge", "--adapter", str(place / f"run{rank}" / "adapter"), "--output"]
        assert finish([*out, str(place / f"whole{rank}")], log) == 0
    started = time.monotonic()
    assert finish([*out, str(output)], log) == 0
    span = time.monotonic() - started
    figures = dict.fromkeys(("kills", "ended_before", "torn", "mixed", "lost", "leftovers", "different"), 0)
    rank = 4
    for _ in range(count):
        before, rank = rank, 2 if rank == 4 else 4
        words = ["merge", "--adapter", str(place / f"run{rank}" / "adapter"), "--output", str(output), "--overwrite"]
        status = kill_after(command(words, log), random.uniform(0.0, 1.05 * span))
        figures["kills" if status is None else "ended_before"] += 1
        figures["lost"] += not (output / "config.json").is_file()
        figures["mixed"] += not (same(output, place / f"whole{before}") or same(output, place / f"whole{rank}"))
        if status is None:
            assert finish(words, log) == 0, Path(log).read_text()[-3000:]
        figures["different"] += not same(output, place / f"whole{rank}")
        figures["leftovers"] += os.listdir(output.parent) != ["merged"] or bool(leftovers(output))
    return figures


def compare(count, place):
    """Kills of a grid (and of the cell that it runs, by the kernel), given the same command again until it ends."""
    model, data = prepare(place)
    log = str(place / "log")
    shared = {"model": str(model), "data": str(data), "eval_size": 8, "lr": 5e-3, "dtype": "float32", "batch_size": 4, "rank": 2}
    shared |= {"targets": ["q_proj"], "save_steps": 1, "log_steps": 1, "tensorboard": False, "max_steps": 6}
    (place / "grid.yaml").write_text(
        json.dumps({"methods": ["lora", "dora"], "seeds": [0], "score": "eval_loss", "resamples": 100, "settings": shared})
    )
    words = ["compare", str(place / "grid.yaml"), "--output"]
    started = time.monotonic()
    assert finish([*words, str(place / "whole")], log) == 0, Path(log).read_text()[-3000:]
    span = time.monotonic() - started
    cells = sorted(p.name for p in (place / "whole" / "cells").iterdir())
    figures = dict.fromkeys(("kills", "ended_before", "lost", "leftovers", "different"), 0)
    output = place / "grid"
    for _ in range(count):
        os.system(f"rm -rf {output}")
        status = kill_after(command([*words, str(output)], log), random.uniform(0.0, span))
        figures["kills" if status is None else "ended_before"] += 1
        while status is None or (status == 2 and "is in use" in Path(log).read_text()[-400:]):
            time.sleep(0.2)  # the cell that was left finishes its step
            status = finish([*words, str(output)], log)
        figures["lost"] += status != 0 or sorted(p.name for p in (output / "cells").iterdir()) != cells
        pairs = [(output / "cells" / name, place / "whole" / "cells" / name) for name in cells]
        figures["different"] += any(not same(a / "adapter", b / "adapter") or trained(a) != trained(b) for a, b in pairs)
        figures["leftovers"] += bool(leftovers(output))
    return figures


if __name__ == "__main__":
    mode, count, place = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    place.mkdir(parents=True, exist_ok=True)
    random.seed(os.environ.get("SEED", "0"))
    work = {"train": train, "merge": merge, "compare": compare}.get(mode)
    print(json.dumps({"mode": mode} | (work(count, place) if work else saves(mode, count, place))))
