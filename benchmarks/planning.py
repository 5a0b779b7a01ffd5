"""`doratune plan` against the memory that training takes: each run in a process of its own, its peak read from the system.

    python benchmarks/planning.py                      # SmolLM2-135M on CPU, full, LoRA, DoRA, DoRA over nf4, two batch sizes

What loading leaves behind is not the step's: the peak counts from the moment when the model is there. One JSON, written after
each case. Linux.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "planning_cpu.json"
CASES = [
    {"method": method, "quantize": quantize, "batch_size": batch, "max_length": 128}
    for batch in (4, 8)
    for method, quantize in (("full", "none"), ("lora", "none"), ("dora", "none"), ("dora", "nf4"))
]


class PeakFromHere:
    """What `train` takes for scoring: its check comes once the model is loaded."""

    def check(self, model, tokenizer) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def __call__(self, model, tokenizer) -> None:
        pass


def measure(case: dict) -> None:
    """Three steps on examples that fill `max_length`, in this process; prints the peak."""
    from doratune.cli.output import keep_freed_memory

    keep_freed_memory()
    from doratune.evaluation.evaluate import after_training  # noqa: F401 (what the command loads)
    from doratune.training.recipe import TrainRecipe
    from doratune.training.train import train

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.json"
        long = "count " * (3 * case["max_length"])
        data.write_text(json.dumps([{"instruction": long, "input": "", "output": "one two three"} for _ in range(32)]))
        settings = {"max_steps": 3, "train_on_prompt": True, "tensorboard": False, "output": f"{folder}/run"}
        recipe = TrainRecipe(data=str(data), **settings, **case)
        print(train(recipe, lambda line: None, score=PeakFromHere())["peak_bytes"])


def plan(case: dict) -> dict:
    from doratune.planning import Planner, PlanSettings

    return Planner(PlanSettings(**case, device="cpu", largest="none")).plan().to_dict()


def main() -> None:
    from doratune.support.environment import environment
    from doratune.support.files import write_json

    rows = []
    for case in CASES:
        command = [sys.executable, __file__, "--measure", json.dumps(case)]
        measured = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        planned = plan(case)
        ratio = planned["total"] / measured
        rows.append(
            {**case, "measured_bytes": measured, "planned_bytes": planned["total"], "ratio": ratio, "terms": planned["terms"]}
        )
        print(f"{case}: measured {measured / 2**20:.0f} MiB, planned {planned['total'] / 2**20:.0f} MiB, {ratio:.3f}", flush=True)
        write_json(RESULT, {"command": "python benchmarks/planning.py", "environment": environment(), "rows": rows})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(json.loads(sys.argv[2]))
    else:
        main()
