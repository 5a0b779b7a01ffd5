"""The main job in one command: score a real model, fine-tune it with DoRA, score it again, merge it, compare, report.

    RUN/adapter  RUN/merged  RUN/recipe.yaml  RUN/metrics.json  RUN/loss.png  RUN/report.md  RUN/scores/  RUN/data/

Learning the format (does the model answer in the form asked for?) and learning content (is the answer right when no format
is needed?) are reported apart: the first is the share of parsable outputs under `generate`, the second `likelihood`.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..adapter.attach import detach
from ..checkpoint.logits import agreement
from ..checkpoint.merge import merge_checkpoint
from ..data import facts
from ..evaluation.evaluate import evaluate, show
from ..evaluation.tasks import load_task
from ..support.files import replacing, write_json
from ..support.models import load_model, load_tokenizer
from ..support.outputs import refuse_inputs
from ..support.values import check_values
from ..training.folder import WRITTEN, RunFolder
from ..training.plots import PLOT, plot_loss
from ..training.recipe import TrainRecipe
from ..training.train import train, write_recipe
from .settings import DemoSettings


@dataclass
class Stopwatch:
    """Seconds of each stage."""

    seconds: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=time.perf_counter)

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage], self.last = now - self.last, now


def demo(settings: DemoSettings, recipe: TrainRecipe, say, progress) -> dict:
    """Run all stages; returns what metrics.json holds.

    Raises:
        UserError: a setting, the model or the output folder is not usable.
    """
    check_values(settings)
    output, watch = Path(settings.output), Stopwatch()
    run = RunFolder(output, (*WRITTEN, "data", "merged", "report.md"))
    refuse_inputs(output, {"the model": settings.model, "the recipe": settings.recipe})
    run.check(settings.overwrite)
    tokenizer, model = load_tokenizer(settings.model), load_model(settings.model, recipe.dtype)
    run.begin()
    for half in ("train", "test"):
        write_json(output / "data" / f"{half}.json", facts.items(half))
    recipe.model, recipe.data, recipe.output = settings.model, str(output / "data" / "train.json"), str(output)
    recipe.max_steps, recipe.overwrite = settings.max_steps, True
    tasks = [("demo", load_task(str(output / "data" / "test.json"), limit=settings.items)[1])]
    watch.lap("load")

    say(f"\n1/4 scoring {settings.model} on {len(tasks[0][1])} test items")
    before = evaluate(model, tokenizer, tasks, batch_size=40, output=output / "scores" / "before", progress=progress)
    say(show(before))
    watch.lap("score before")
    say(f"\n2/4 training DoRA, rank {recipe.rank}")
    training = train(recipe, say, model, tokenizer, folder=run)
    watch.lap("train")
    say("\n3/4 scoring again")
    after = evaluate(model, tokenizer, tasks, batch_size=40, output=output / "scores" / "after", progress=progress)
    say(show(after))
    watch.lap("score after")
    say("\n4/4 merging into an ordinary model folder")
    detach(model)
    del model
    merge_checkpoint(settings.model, output / "adapter", output / "merged", recipe.dtype, overwrite=True)
    compared = agreement(settings.model, output / "adapter", output / "merged", recipe.dtype)
    say(str(compared))
    watch.lap("merge")
    metrics = summarize(before, after) | {
        "training": training,
        "merged_agrees": compared.__dict__ | {"ok": compared.ok},
        "seconds": watch.seconds | {"all": sum(watch.seconds.values())},
        "output": str(output),
    }
    write_json(output / "metrics.json", metrics)
    plot_loss(training["log"], output / PLOT)
    write_recipe(output / "recipe.yaml", recipe)
    with replacing(output / "report.md") as temporary:
        temporary.write_text(report(metrics, before, after, compared), encoding="utf-8")
    run.finish()
    say(f"\nreport: {output / 'report.md'}")
    return metrics


def summarize(before: dict, after: dict) -> dict:
    """The figures that matter, format and content apart."""
    (g0, l0), (g1, l1) = before["results"], after["results"]
    margin = (l1["accuracy"] - l1["majority"]) / max(l1["standard_error"], 1e-9)
    return {
        "generate": {"before": g0["accuracy"], "after": g1["accuracy"], "gain": g1["accuracy"] - g0["accuracy"]},
        "format_learned": {"before": 1 - g0["unparsable"], "after": 1 - g1["unparsable"]},
        "content_learned": {
            "before": l0["accuracy"],
            "after": l1["accuracy"],
            "majority": l1["majority"],
            "standard_errors_above_majority": margin if math.isfinite(margin) else None,
        },
        "results": {"before": before["results"], "after": after["results"]},
    }


def report(metrics: dict, before: dict, after: dict, compared) -> str:
    training, content, form = metrics["training"], metrics["content_learned"], metrics["format_learned"]
    return f"""# doratune demo

Test items share no thing with the training items. `generate` asks for the answer in its format; `likelihood` only compares the
probabilities of the allowed answers, so it needs no format.

| | before | after |
|---|---|---|
| accuracy, generate | {before["results"][0]["accuracy"]:.1%} | {after["results"][0]["accuracy"]:.1%} |
| format: outputs that hold an answer | {form["before"]:.1%} | {form["after"]:.1%} |
| content: accuracy, likelihood | {content["before"]:.1%} | {content["after"]:.1%} |
| always the most frequent answer | {content["majority"]:.1%} | {content["majority"]:.1%} |

Before:

```
{show(before)}
```

After:

```
{show(after)}
```

Training: {training["steps"]} steps, {training["tokens"]:,} tokens, {training["tokens_per_second"]:.0f} tokens/s, final loss \
{training["final_loss"]:.3f}; {training["moved"]}.

![loss](loss.png)

Merged model: {compared}

Seconds: {json.dumps({k: round(v) for k, v in metrics["seconds"].items()})}; torch {torch.__version__}
"""
