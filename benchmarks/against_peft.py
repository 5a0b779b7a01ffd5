"""The same fine-tuning by doratune and by PEFT's DoRA: training speed, and the adapter that PEFT ends with.

    python benchmarks/against_peft.py speed RECIPE.yaml --steps 24      three arms, interleaved step by step in one process
    python benchmarks/against_peft.py train RECIPE.yaml --output DIR    PEFT trained on the recipe's batches, saved by PEFT
    python benchmarks/against_peft.py items OURS THEIRS                 two folders of `doratune evaluate`, item by item

Arms of `speed`: `doratune`, the recipe's length-grouped batches; `peft_grouped`, PEFT over the very same tensors;
`peft_padded`, PEFT in the plain loop of its examples: shuffled examples padded to the longest of the batch, logits of all
positions. PEFT runs unmodified with its defaults from the same start (A is ours). Real tokens only are counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import peft
import torch
import transformers
import yaml

import doratune
from doratune.cli.output import keep_freed_memory
from doratune.data.encode import AnswerCollator
from doratune.support.models import contiguous_head, load_model, load_tokenizer
from doratune.training.examples import datasets
from doratune.training.recipe import TrainRecipe
from doratune.training.trainer import EpochLengthSampler


def read_recipe(path: str) -> TrainRecipe:
    return TrainRecipe(**yaml.safe_load(Path(path).read_text()))


def grouped_batches(recipe: TrainRecipe, rows, collate):
    order = list(EpochLengthSampler(recipe.batch_size, [r["length"] for r in rows], recipe.seed))
    return [collate([rows[i] for i in order[s : s + recipe.batch_size]]) for s in range(0, len(order), recipe.batch_size)]


def padded_batches(recipe: TrainRecipe, rows, tokenizer):
    order = list(range(len(rows)))
    random.Random(recipe.seed).shuffle(order)
    collate = transformers.DataCollatorForSeq2Seq(tokenizer, padding=True)
    keys = ("input_ids", "labels")
    chunks = (order[s : s + recipe.batch_size] for s in range(0, len(order), recipe.batch_size))
    return [dict(collate([{k: rows[i][k] for k in keys} for i in chunk])) for chunk in chunks]


def ours(recipe: TrainRecipe):
    model = load_model(recipe.model, recipe.dtype)
    doratune.attach(model, recipe.adapter())
    return model, torch.optim.AdamW(doratune.parameter_groups(model, recipe.lr, recipe.weight_decay))


def theirs(recipe: TrainRecipe):
    """PEFT's DoRA from the same A, through a folder saved by us."""
    model = load_model(recipe.model, recipe.dtype)
    with tempfile.TemporaryDirectory() as folder:
        doratune.attach(model, recipe.adapter())
        doratune.save(model, folder)
        doratune.detach(model)
        model = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)


def step(model, optimizer, batch, max_grad_norm: float) -> float:
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def speed(recipe: TrainRecipe, steps: int, warm_up: int = 2) -> dict:
    tokenizer = load_tokenizer(recipe.model)
    rows, _ = datasets(recipe, tokenizer, print)
    model, optimizer = ours(recipe)
    peft_model, peft_optimizer = theirs(recipe)
    grouped = grouped_batches(recipe, rows, AnswerCollator(tokenizer.pad_token_id, model))
    padded = padded_batches(recipe, rows, tokenizer)
    random.Random(1).shuffle(grouped)
    arms = {
        "doratune": (model, optimizer, grouped),
        "peft_grouped": (peft_model, peft_optimizer, grouped),
        "peft_padded": (peft_model, peft_optimizer, padded),
    }
    measured = {arm: [] for arm in arms}
    with contiguous_head(model), contiguous_head(peft_model):
        for number in range(warm_up + steps):
            for arm, (net, opt, batches) in arms.items():
                batch = batches[number]
                net.train()
                wall, cpu = time.perf_counter(), time.process_time()
                step(net, opt, batch, recipe.max_grad_norm)
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                if number >= warm_up:
                    measured[arm].append((int(batch["attention_mask"].sum()), wall, cpu))
            print(f"step {number + 1} of {warm_up + steps}", file=sys.stderr)
    result = {}
    for arm, rows_ in measured.items():
        tokens, wall, cpu = (sum(column) for column in zip(*rows_))
        result[arm] = {"tokens": tokens, "tokens_per_wall_s": tokens / wall, "tokens_per_cpu_s": tokens / cpu}
    for arm in ("peft_grouped", "peft_padded"):
        for clock in ("wall", "cpu"):
            key = f"tokens_per_{clock}_s"
            result[f"doratune / {arm} ({clock})"] = result["doratune"][key] / result[arm][key]
    return result


def train_peft(recipe: TrainRecipe, output: str) -> dict:
    tokenizer = load_tokenizer(recipe.model)
    rows, _ = datasets(recipe, tokenizer, print)
    model, optimizer = theirs(recipe)
    batches = grouped_batches(recipe, rows, AnswerCollator(tokenizer.pad_token_id, model.get_base_model()))
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, recipe.warmup_steps, len(batches))
    model.train()
    started, losses = time.perf_counter(), []
    with contiguous_head(model):
        for number, batch in enumerate(batches, 1):
            losses.append(step(model, optimizer, batch, recipe.max_grad_norm))
            schedule.step()
            print(f"step {number} of {len(batches)}: loss {losses[-1]:.3f}", file=sys.stderr)
    seconds = time.perf_counter() - started
    model.save_pretrained(output)
    tokens = sum(int(b["attention_mask"].sum()) for b in batches)
    return {
        "steps": len(batches),
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "final_loss": sum(losses[-10:]) / 10,
    }


def items(ours: str, theirs: str) -> dict:
    """Item by item: how often both, one or none is right, how often the answer is the same, and the sign test's z."""
    result = {}
    for path in sorted(Path(ours).glob("*.jsonl")):
        a, b = ([json.loads(line) for line in (Path(f) / path.name).read_text().splitlines()] for f in (ours, theirs))
        assert [r["prompt"] for r in a] == [r["prompt"] for r in b], "the folders hold different items"
        only_a = sum(x["correct"] and not y["correct"] for x, y in zip(a, b))
        only_b = sum(y["correct"] and not x["correct"] for x, y in zip(a, b))
        result[path.stem] = {
            "items": len(a),
            "ours": sum(r["correct"] for r in a) / len(a),
            "theirs": sum(r["correct"] for r in b) / len(a),
            "only_ours_right": only_a,
            "only_theirs_right": only_b,
            "same_answer": sum(x["answer"] == y["answer"] for x, y in zip(a, b)) / len(a),
            "z": (only_a - only_b) / max(1, only_a + only_b) ** 0.5,
        }
    return result


def facts() -> dict:
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft, doratune)}
    return {
        "device": f"CPU, {torch.get_num_threads()} threads, {platform.machine()}",
        "versions": versions,
        "commit": run.stdout.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    for name in ("speed", "train"):
        command = commands.add_parser(name)
        command.add_argument("recipe")
        command.add_argument("--steps", type=int, default=24)
        command.add_argument("--output", default="runs/peft")
    command = commands.add_parser("items")
    command.add_argument("ours")
    command.add_argument("theirs")
    arguments = parser.parse_args()
    keep_freed_memory()
    record = facts() | {"what": f"against_peft {arguments.what}"}
    if arguments.what == "items":
        record["result"] = items(arguments.ours, arguments.theirs)
    else:
        recipe = read_recipe(arguments.recipe)
        record["recipe"] = dataclasses.asdict(recipe)
        run = speed(recipe, arguments.steps) if arguments.what == "speed" else train_peft(recipe, arguments.output)
        record["result"] = run
    results = Path(__file__).parent / "results" / f"against_peft_{arguments.what}.json"
    results.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["result"]))


if __name__ == "__main__":
    main()
