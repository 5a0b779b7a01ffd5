"""A DoRA model of PEFT before and after `doratune.peft.accelerate`: training steps, also with dropout, and greedy decode.

    python benchmarks/accelerated_peft.py [--model NAME] [--dtypes float32 bfloat16] [--rounds 5]

Arms of each measurement run in turn in one process (`doratune.bench`): the frozen base, PEFT, and PEFT accelerated, over the same
weights. Written: results/accelerated_peft_cpu_<dtype>.json.
"""

from __future__ import annotations

import argparse
import functools
from contextlib import ExitStack
from pathlib import Path

from torch import nn

from doratune.bench import decode, record, train_step
from doratune.bench.arms import build
from doratune.bench.clock import interleave, summary
from doratune.bench.settings import BenchSettings
from doratune.bench.shapes import load, random_ids
from doratune.support.models import contiguous_head

BEFORE, AFTER, FROZEN = "dora_peft", "accelerated_peft", "frozen"
DROPOUT = 0.05
STEP = {
    f"({AFTER}-{FROZEN})/({BEFORE}-{FROZEN})": (AFTER, BEFORE, FROZEN),
    f"{BEFORE}/{AFTER}": (BEFORE, AFTER),
    f"{AFTER}/{FROZEN}": (AFTER, FROZEN),
}
DECODE = {f"{BEFORE}/{AFTER}": (BEFORE, AFTER), f"{AFTER}/{FROZEN}": (AFTER, FROZEN)}


def training(base: nn.Module, settings: BenchSettings, dropout: float) -> dict:
    ids = random_ids(base, settings.batch_size, settings.length)
    arms = {}
    for name in (FROZEN, BEFORE, AFTER):
        model = build(name, base, settings.targets, settings.ranks[0])
        for module in model.modules():
            if dropout and hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = nn.Dropout(dropout)
        arms[name] = train_step.TrainStep(model, ids)
    return summary(interleave(arms, settings.rounds, settings.warm_up, ids.device), STEP)


def decoding(base: nn.Module, settings: BenchSettings) -> dict:
    prompt = random_ids(base, 1, decode.PROMPT)
    with ExitStack() as heads:
        runs = {}
        for name in (FROZEN, BEFORE, AFTER):
            model = build(name, base, settings.targets, settings.ranks[0]).eval()
            heads.enter_context(contiguous_head(model))
            runs[name] = functools.partial(decode.decode, model, prompt, settings.new_tokens)
        return summary(interleave(runs, settings.few_rounds, 1, prompt.device), DECODE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new_tokens", type=int, default=16)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results"))
    given = parser.parse_args()
    settings = BenchSettings(
        arms=[FROZEN, BEFORE, AFTER], model=given.model, dtypes=given.dtypes, ranks=[16], rounds=given.rounds,
        new_tokens=given.new_tokens, warm_up=1, output=given.output,
    ).check()  # fmt: skip
    for dtype in settings.dtypes:
        base = load(settings.model, dtype, settings.torch_device())
        measurements = {
            "train_step": lambda base=base: training(base, settings, 0.0),
            f"train_step, dropout {DROPOUT}": lambda base=base: training(base, settings, DROPOUT),
            "decode": lambda base=base: decoding(base, settings),
        }
        result = {}
        for what, measure in measurements.items():
            result[what] = measure()
            for name, ratio in result[what]["ratios"].items():
                print(
                    f"{dtype} {what:<26} {name:<54} {ratio['wall_s']['p50']:.3f} wall, {ratio['cpu_s']['p50']:.3f} CPU", flush=True
                )
        record.write(Path(settings.output), "accelerated_peft", record.facts(settings), {dtype: result}, dtype)


if __name__ == "__main__":
    main()
