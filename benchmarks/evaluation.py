"""Evaluation: is the score the same at any batch size, and how fast is it beside PEFT with one item at a time?

    python benchmarks/evaluation.py --adapter runs/ours/adapter --data data/commonsense --items 100

`same`: every task of the folder (TASK/test.json) by each protocol, one item at a time and in batches; verdicts and outputs
that differ are counted. `speed`: protocol `generate` (greedy, at most 32 new tokens, first match of the task's pattern) on
chunks of items; each chunk goes through every arm in turn, in one process. All arms see the same prompts and give verdicts
by the same rule:

    doratune       batches, sorted by length within a chunk; a sequence stops at its first match
    doratune_one   the same, one item at a time
    peft_batches   PEFT with the same adapter folder, left-padded batches, model.generate
    peft_one       PEFT with the same adapter folder, model.generate for each item
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import peft
import torch

import doratune
from doratune.bench.clock import interleave, ratios
from doratune.bench.record import facts, write
from doratune.checkpoint.adapter import base_model_of
from doratune.cli.output import keep_freed_memory
from doratune.data.instruction import prompt_of
from doratune.evaluation.evaluate import PROTOCOLS, evaluate, load_tasks
from doratune.evaluation.generate import generate, left_pad
from doratune.evaluation.kinds.commonsense import first_answer
from doratune.support.models import contiguous_head, load_model, load_tokenizer

NEW_TOKENS = 32


@dataclass(kw_only=True)
class Settings:
    """What is measured; the fields are the flags."""

    adapter: str = ""
    model: str = ""
    data: str = ""
    tasks: str = ""
    what: str = "same,speed"
    protocols: str = "generate,likelihood"
    dtype: str = "float32"
    items: int = 100
    batch_size: int = 32
    chunks: int = 5
    seed: int = 0
    quantize: str = "none"

    def torch_device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_all(settings: Settings) -> list[tuple[str, list[dict]]]:
    """(name, items) of each task, the items drawn with the seed."""
    names = settings.tasks.split(",") if settings.tasks else sorted(p.parent.name for p in Path(settings.data).glob("*/test.json"))
    tasks = load_tasks([str(Path(settings.data) / name / "test.json") for name in names])
    draw = random.Random(settings.seed)
    return [(name, draw.sample(items, min(settings.items, len(items)))) for name, items in tasks]


def records_of(model, tokenizer, name: str, items: list[dict], protocol: str, batch_size: int) -> list[dict]:
    """Every item with its verdict, as `doratune evaluate` writes it; the texts are not kept."""
    with tempfile.TemporaryDirectory() as folder:
        evaluate(model, tokenizer, [(name, items)], (protocol,), batch_size=batch_size, output=Path(folder))
        return [json.loads(line) for line in (Path(folder) / f"{name}.{protocol}.jsonl").read_text("utf-8").splitlines()]


def same(model, tokenizer, tasks, settings: Settings) -> dict:
    """By task and protocol: right answers at both batch sizes, and how many verdicts, answers and outputs differ."""
    result = {}
    for name, items in tasks:
        for protocol in settings.protocols.split(","):
            sizes = (1, settings.batch_size)
            one, many = runs = [records_of(model, tokenizer, name, items, protocol, size) for size in sizes]
            differing = {key: sum(a[key] != b[key] for a, b in zip(one, many)) for key in ("correct", "answer", "output")}
            right = {str(size): sum(r["correct"] for r in run) for size, run in zip(sizes, runs)}
            found = {"items": len(items), "right": right, "differing": differing}
            if protocol == "likelihood":
                pairs = [(a["scores"][c], b["scores"][c]) for a, b in zip(one, many) for c in a["scores"]]
                found["largest_score_difference"] = max(abs(x - y) for x, y in pairs)
            result.setdefault(name, {})[protocol] = found
            print(f"{name} {protocol}: {found}", file=sys.stderr)
    return result


def peft_answers(model, tokenizer, items, batch_size: int) -> list[str | None]:
    """The answers that PEFT's model gives, by transformers' plain generate."""
    answers = []
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        ids, mask = left_pad([tokenizer(prompt_of(item))["input_ids"] for item in batch], tokenizer.pad_token_id, model.device)
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        answers += [first_answer(text, item) for text, item in zip(texts, batch)]
    return answers


def our_answers(model, tokenizer, items, batch_size: int) -> list[str | None]:
    records = generate(model, tokenizer, items, batch_size, 1, NEW_TOKENS, lambda n: None)
    return [record["answer"] for record in records]


def speed(model, peft_model, tokenizer, tasks, settings: Settings) -> dict:
    """Items a second of each arm, ratios chunk by chunk, and how many answers differ from PEFT's one by one."""
    items = [item for _, part in tasks for item in part]
    random.Random(settings.seed).shuffle(items)
    size = max(1, len(items) // settings.chunks)
    chunks = [items[s : s + size] for s in range(0, size * settings.chunks, size)]
    chunks = [chunks[0][:2]] + [chunk for chunk in chunks if chunk]  # the first is the warm-up
    arms = {
        "doratune": (our_answers, model, settings.batch_size),
        "doratune_one": (our_answers, model, 1),
        "peft_batches": (peft_answers, peft_model, settings.batch_size),
        "peft_one": (peft_answers, peft_model, 1),
    }
    answers = {name: [] for name in arms}

    def run(name: str) -> None:
        answer, net, batch_size = arms[name]
        answers[name].append(answer(net, tokenizer, chunks[len(answers[name])], batch_size))

    runs = {name: lambda name=name: run(name) for name in arms}
    shown = iter(range(1, len(arms) * len(chunks) + 1))
    report = lambda n: print(f"{next(shown)} of {len(arms) * len(chunks)}", file=sys.stderr)  # noqa: E731
    with contiguous_head(model), contiguous_head(peft_model):
        series = interleave(runs, len(chunks) - 1, 1, settings.torch_device(), report)
    return summary(series, answers, chunks[1:])


def summary(series, answers: dict, chunks: list[list[dict]]) -> dict:
    """The figures of `speed` from seconds and answers."""
    total, gold = sum(map(len, chunks)), [item["answer"] for chunk in chunks for item in chunk]
    kept = {name: [a for chunk in given[1:] for a in chunk] for name, given in answers.items()}
    arms = {
        name: {
            "items_per_wall_s": total / sum(one.wall_s),
            "items_per_cpu_s": total / sum(one.cpu_s),
            "right": sum(a == g for a, g in zip(kept[name], gold)),
            "answers_unlike_peft_one": sum(a != b for a, b in zip(kept[name], kept["peft_one"])),
        }
        for name, one in series.items()
        if not one.failed
    }
    names = [name for name in series if name != "doratune"]
    return {"items": total, "arms": arms, "times faster than": {name: ratios(series, name, "doratune") for name in names}}


def models(settings: Settings):
    """(model with the adapter, PEFT's model with the same folder, tokenizer); both are loaded, as a user would."""
    name = settings.model or base_model_of(settings.adapter)
    tokenizer, model = load_tokenizer(name), load_model(name, settings.dtype)
    doratune.load(model, settings.adapter)
    theirs = None
    if "speed" in settings.what.split(","):
        theirs = peft.PeftModel.from_pretrained(load_model(name, settings.dtype), settings.adapter).eval()
    return model.eval(), theirs, tokenizer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Settings):
        if field.name != "quantize":
            required = field.name in ("adapter", "data")
            parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default, required=required)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results"))
    given = vars(parser.parse_args(argv))
    output = Path(given.pop("output"))
    settings = Settings(**given)
    what = settings.what.split(",")
    if wrong := (set(what) - {"same", "speed"}) | (set(settings.protocols.split(",")) - set(PROTOCOLS)):
        parser.error(f"unknown {', '.join(sorted(wrong))}; --what takes same, speed; --protocols takes {', '.join(PROTOCOLS)}")
    if min(settings.items, settings.batch_size, settings.chunks) < 1:
        parser.error("items, batch_size and chunks are at least 1")
    keep_freed_memory()
    run_facts = facts(settings)
    run_facts["settings"] = {k: v for k, v in run_facts["settings"].items() if k not in ("adapter", "data", "model")}
    tasks = load_all(settings)
    run_facts["settings"]["tasks"] = [name for name, _ in tasks]
    model, theirs, tokenizer = models(settings)
    result = {}
    if "same" in what:
        result["same"] = same(model, tokenizer, tasks, settings)
    if "speed" in what:
        result["speed"] = speed(model, theirs, tokenizer, tasks, settings)
    print(write(output, "evaluation", run_facts, result))


if __name__ == "__main__":
    main()
