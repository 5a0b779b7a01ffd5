"""What two processes do under DeepSpeed, and one process on the whole batch: `torchrun zero_worker.py OUT STAGE`; writes OUT.0.

accelerate takes DeepSpeed on a CPU only where it is told the backend; with `cpu=True` it trains as DDP without a word.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs
from safetensors.torch import load_file
from worker import METHODS, attached, base, distance, ids, refusal, train

import doratune

OUT, STAGE = Path(sys.argv[1]), sys.argv[2]
ALL_IN_PARTS = {"stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 0} if "parts" in STAGE else {}
CONFIG = {
    "zero_optimization": {"stage": int(STAGE[0])} | ALL_IN_PARTS,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "zero_allow_untested_optimizer": True,
}
CASES = {name: METHODS[name] for name in ("lora", "dora", "dora, full gradient", "dvora")} | {
    "head": {"targets": ["lm_head", "embed_tokens", "q_proj"]}
}


def trained(accelerator, model):
    """(engine, losses) of three steps."""
    accelerator.free_memory()  # it goes on with its first engine else
    optimizer = torch.optim.AdamW(doratune.parameter_groups(model, lr=1e-2))
    engine, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for step in range(3):
        batch = ids(step).chunk(2)[dist.get_rank()]
        loss = engine(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach().reshape(1)).mean().item())
    return engine, losses


def saved(model, folder):
    doratune.save(model, folder)
    dist.barrier()
    return load_file(folder / "adapter_model.safetensors")


def main():
    torch.set_num_threads(1)
    handlers = [InitProcessGroupKwargs(backend="nccl" if torch.cuda.is_available() else "gloo")]
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=CONFIG), kwargs_handlers=handlers)
    found, folder = {}, OUT.parent
    for name, settings in CASES.items():
        single = attached(**settings)
        expected = train(single, split=False)
        engine, losses = trained(accelerator, attached(**settings))
        model = accelerator.unwrap_model(engine)
        where = folder / f"{name} by {0 if STAGE[0] == '3' else dist.get_rank()}"
        tensors, of_one = saved(model, where), saved(single, folder / f"{name} single {dist.get_rank()}")
        found[name] = {
            "losses": (expected, losses),
            "saved": max((tensors[key] - t).abs().max().item() for key, t in of_one.items()),
            "verify": (str(doratune.verify(model)), str(doratune.verify(single))),
            "inspect": (doratune.inspect(model).table(), doratune.inspect(single).table()),
            "merge": refusal(doratune.merge, model) if STAGE[0] == "3" else None,
            "merged state": distance(doratune.merged_state_dict(model), doratune.merged_state_dict(single)),
        }
    found["engine"] = accelerator.distributed_type.value, type(engine).__name__, engine.zero_optimization_stage()
    plain = base()
    plain, _ = accelerator.prepare(plain, torch.optim.AdamW(plain.parameters()))
    found["attached late"] = refusal(doratune.attach, accelerator.unwrap_model(plain)) or ""
    if dist.get_rank() == 0:
        OUT.with_suffix(".0").write_text(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    main()
