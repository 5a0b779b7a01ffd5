"""DoRA under FSDP2 in two processes over gloo: its step beside LoRA's, interleaved, and each process's peak beside one process's.

    python benchmarks/sharded.py             # a Llama of hidden size 768, all linear layers, rank 24, 4 × 192 tokens, fp32

Each block and the root are `fully_shard`ed, as `doratune train --fsdp shard` does; one thread a process. Memory: the bytes of all
tensors at the peak of two steps (`bench/allocations.py`), each in processes of its own. Two processes are expected to hold half of
what one holds, and whole: three copies of a block (one that computes, one that is fetched meanwhile, and the buffer in which it
arrives), or the root's and its buffer if that is more, and the second half of the factors of all layers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "sharded_cpu.json"
MODEL, RANK, BATCH, LENGTH, ROUNDS, WARM_UP = "llama-768-shape", 24, 4, 192, 12, 3
ARMS = ("lora", "dora")


def build(arm: str):
    """(adapted model, in shards where there are several processes; its optimizer)."""
    import torch
    from torch.distributed.fsdp import fully_shard

    import doratune
    from doratune.bench.arms import attach_arm
    from doratune.bench.shapes import shaped

    model = attach_arm(arm, shaped(MODEL, "float32", torch.device("cpu")), ["all-linear"], RANK).train()
    if processes() > 1:
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
    return model, torch.optim.AdamW(doratune.parameter_groups(model, lr=1e-4))


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def step_of(arm: str):
    """A function that takes one step on this process's part of the batch."""
    import torch

    model, optimizer = build(arm)
    generator = torch.Generator().manual_seed(int(os.environ.get("RANK", "0")))
    ids = torch.randint(3, 4000, (BATCH // processes(), LENGTH), generator=generator)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def times(output: str) -> None:
    """Both arms in turn; the first process writes."""
    import torch
    import torch.distributed as dist

    from doratune.bench.clock import interleave, summary

    steps = {arm: step_of(arm)[1] for arm in ARMS}
    series = interleave(steps, ROUNDS, WARM_UP, torch.device("cpu"))
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(summary(series, {"dora/lora": ("dora", "lora")})))
    dist.barrier()


def peak(output: str, arm: str) -> None:
    """Bytes of tensors of this process; and what two processes hold whole."""
    from doratune.bench.allocations import peak_of_tensors

    built = []

    def prepare():
        model, step = step_of(arm)
        built.append(model)
        return step

    result = {"bytes": peak_of_tensors(prepare), **whole(built[0])}
    Path(f"{output}.{os.environ.get('RANK', '0')}").write_text(json.dumps(result))


def whole(model) -> dict[str, int]:
    """Bytes that each of two processes holds whole, for a while or for good."""
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.model.layers]
    root = sum(p.numel() for p in model.parameters()) - sum(blocks)
    adapted = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name or "magnitude" in name)
    return {"together": 4 * max(3 * max(blocks), 2 * root + max(blocks)), "factors": 4 * adapted}


def run(count: int, *words: str) -> None:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone"] if count > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launcher, __file__, *words], check=True, env=environment)


def main() -> None:
    import tempfile

    from doratune.support.environment import environment
    from doratune.support.files import write_json

    with tempfile.TemporaryDirectory() as folder:
        run(2, "times", f"{folder}/times")
        result = {"step": json.loads(Path(f"{folder}/times").read_text()), "peak": {}}
        for arm in ARMS:
            run(1, "peak", f"{folder}/one_{arm}", arm)
            run(2, "peak", f"{folder}/two_{arm}", arm)
            one = json.loads(Path(f"{folder}/one_{arm}.0").read_text())["bytes"]
            two = [json.loads(Path(f"{folder}/two_{arm}.{rank}").read_text()) for rank in range(2)]
            expected = one / 2 + two[0]["together"] + two[0]["factors"] / 2
            measured = max(part["bytes"] for part in two)
            result["peak"][arm] = {
                "one_process": one,
                "two_processes": measured,
                "expected": expected,
                "ratio": measured / expected,
            }
    facts = {"model": MODEL, "rank": RANK, "batch": BATCH, "length": LENGTH, "dtype": "float32", "rounds": ROUNDS}
    write_json(RESULT, {"command": "python benchmarks/sharded.py", "environment": environment(), "facts": facts, **result})
    print(json.dumps(result["step"]["ratios"]), json.dumps(result["peak"], indent=1))


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        import torch

        torch.set_num_threads(1)
        if processes() > 1:
            torch.distributed.init_process_group("gloo")
        {"times": times, "peak": peak}[sys.argv[1]](*sys.argv[2:])
        if processes() > 1:
            torch.distributed.destroy_process_group()
