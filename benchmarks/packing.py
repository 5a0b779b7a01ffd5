"""Tokens a second of training, the same examples in three kinds of batches: shuffled and padded, grouped by length, packed.

    python benchmarks/packing.py DATA.jsonl --output benchmarks/results/packing_cpu.json

One DoRA model in one process; a step of each arm in turn. The batches are those of an epoch of all examples, `--steps` of each arm
drawn at random. They hold about as many real tokens: `--batch_size` examples, or the rows of `--max_length` tokens nearest to
them. Real tokens alone are counted.
The losses at the start, in float32 over the first `--compared` examples, say that the arms compute the same.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from pathlib import Path

import torch

import doratune
from doratune.cli.output import keep_freed_memory
from doratune.data import DataSettings, encoder, load_items
from doratune.data.encode import IGNORED, AnswerCollator, encode_all
from doratune.data.packing import PackingCollator, pack, without_mask
from doratune.support.models import contiguous_head, load_model, load_tokenizer
from doratune.training.packing import check_packing
from doratune.training.trainer import EpochLengthSampler


def batches_of(rows: list[dict], model, tokenizer, size: int, length: int) -> tuple[dict[str, list[dict]], dict]:
    """{arm: batches}, and what they are made of."""
    single, packing = (cls(tokenizer.pad_token_id, model) for cls in (AnswerCollator, PackingCollator))
    check_packing(model, packing)
    shuffled, grouped = list(range(len(rows))), list(EpochLengthSampler(size, [row["length"] for row in rows], 0))
    random.Random(0).shuffle(shuffled)
    packs = pack(rows, length)
    random.Random(0).shuffle(packs)
    tokens = sum(row["length"] for row in rows)
    a_batch = max(1, round(tokens / len(rows) * size / (tokens / len(packs))))

    def chunks(order, step):
        return [order[i : i + step] for i in range(0, len(order), step)]

    arms = {
        "unpacked": [single([rows[i] for i in chunk]) for chunk in chunks(shuffled, size)],
        "grouped": [single([rows[i] for i in chunk]) for chunk in chunks(grouped, size)],
        "packed": [packing(chunk) for chunk in chunks(packs, a_batch)],
    }
    facts = {
        "examples": len(rows),
        "tokens": tokens,
        "rows": len(packs),
        "full": tokens / (len(packs) * length),
        "rows_a_batch": a_batch,
    }
    return arms, facts | {
        "padding": {arm: 1 - tokens / sum(batch["input_ids"].numel() for batch in batches) for arm, batches in arms.items()}
    }


def mean_loss(model, batches: list[dict]) -> float:
    """Over all answer tokens of all batches."""
    sums = [0.0, 0]
    with torch.no_grad():
        for batch in batches:
            count = int((batch["labels"][:, 1:] != IGNORED).sum())
            sums[0] += model(**without_mask(batch)).loss.item() * count
            sums[1] += count
    return sums[0] / sums[1]


def step(model, optimizer, batch: dict) -> tuple[float, float]:
    """Seconds of wall and of CPU time of one training step."""
    wall, cpu = time.perf_counter(), time.process_time()
    model(**without_mask(batch)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(model, optimizer, arms: dict[str, list[dict]], steps: int) -> dict[str, dict]:
    """Seconds and tokens of each arm, its first step not counted; the arms take turns."""
    spent = {arm: {"wall_s": 0.0, "cpu_s": 0.0, "tokens": 0, "steps": 0} for arm in arms}
    for arm in arms:
        step(model, optimizer, arms[arm][0])  # the first step is not counted
    drawn = {arm: random.Random(0).sample(batches, steps) for arm, batches in arms.items()}
    for turn in range(steps):
        for arm, batches in drawn.items():
            wall, cpu = step(model, optimizer, batches[turn])
            one = spent[arm]
            one["wall_s"], one["cpu_s"], one["steps"] = one["wall_s"] + wall, one["cpu_s"] + cpu, one["steps"] + 1
            one["tokens"] += int(batches[turn]["attention_mask"].sum())
    rates = {"tokens_a_second": "wall_s", "tokens_a_cpu_second": "cpu_s"}
    return {arm: one | {name: one["tokens"] / one[spent_s] for name, spent_s in rates.items()} for arm, one in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--examples", type=int, default=None, help="only so many of the data")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt", default="template")
    parser.add_argument("--compared", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12, help="of each arm")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    tokenizer, model = load_tokenizer(options.model), load_model(options.model, options.dtype)
    items, kind = load_items(options.data)
    random.Random(0).shuffle(items)
    encode = encoder(kind, DataSettings(prompt=options.prompt))
    rows, _ = encode_all(items[: options.examples], encode, tokenizer, options.max_length)
    doratune.attach(model, doratune.AdapterConfig(rank=16, targets=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]))
    arms, facts = batches_of(rows, model, tokenizer, options.batch_size, options.max_length)
    optimizer = torch.optim.AdamW(doratune.parameter_groups(model, lr=1e-4))
    with contiguous_head(model):
        exact = load_model(options.model, "float32")
        few, _ = batches_of(rows[: options.compared], exact, tokenizer, options.batch_size, options.max_length)
        facts["loss"] = {arm: mean_loss(exact, batches) for arm, batches in few.items()}
        del exact
        result = {"arms": measure(model, optimizer, arms, options.steps), "batches": facts}
    result["environment"] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    result["settings"] = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()} | {
        "data": Path(options.data).name
    }
    for arm, one in result["arms"].items():
        rates = f"{one['tokens_a_second']:8.0f} tokens/s, {one['tokens_a_cpu_second']:6.0f} of CPU time"
        print(f"{arm:10} {rates}  padding {facts['padding'][arm]:.0%}")
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
