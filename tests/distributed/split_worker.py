"""Cases of tensor parallelism for `worker.py`'s way of running: models that transformers' plans and parallelize_module split."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig
from worker import METHODS, Collectives, attached, case, distance, ids, randomize, refusal, run, tiny_llama, train

import doratune

BASES = {"plain": {}, "biased": {"attention_bias": True, "mlp_bias": True}, "tied": {"tie_word_embeddings": True}}
TRAINED = {(name, method): 5 for name in ("plain", "biased") for method in ("lora", "dora")}
TRAINED |= {("plain", f"dora, {method}"): 3 for method in ("full gradient", "input axis", "relative")}
TRAINED |= {("biased", "dora, full gradient"): 3, ("tied", "dora"): 3}
"""(model, method) → steps."""


def whole(name):
    """The model in one process; its biases are not zero."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**tiny_llama(layers=1).config.to_dict() | BASES[name])).train()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("bias"):
                p.normal_(std=0.2)
    return model


def split(name, folder):
    if not (folder / name).exists():
        dist.barrier()
        if dist.get_rank() == 0:
            whole(name).save_pretrained(folder / name)
        dist.barrier()
    return AutoModelForCausalLM.from_pretrained(folder / name, distributed_config=DistributedConfig(tp_size=2)).train()


@torch.no_grad()
def logits(model):
    return model(input_ids=ids(0)).logits


def apart(a, b):
    return (a - b).abs().max().item()


@case
def trains(folder):
    """Losses of one process and of two, whether the start is the base's, and how often factors were prepared."""
    found = {}
    for (name, method), steps in TRAINED.items():
        expected = train(attached(whole(name), **METHODS[method]), split=False, steps=steps)
        model = split(name, folder)
        before = logits(model)
        attached(model, **METHODS[method])
        exact = torch.equal(before, logits(model))
        losses = train(model, split=False, steps=steps)
        prepared = {layer.adapted.preparations for _, layer in doratune.adapters(model)}
        found[f"{name}, {method}"] = expected, losses, exact, sorted(prepared)
    settings = {"targets": ["lm_head", "q_proj", "down_proj"]}
    head = train(attached(split("plain", folder), **settings), split=False)
    found["plain, head"] = train(attached(whole("plain"), **settings), split=False), head, True, [4]
    model = split("plain", folder)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found["plain, checkpointed"] = found["plain, dora"][0][:3], train(attached(model), split=False), True, [3]
    return found


@case
def files(folder):
    """Whole files both ways, the looks at a model, merging and back."""
    single = randomize(attached(whole("biased")))
    if dist.get_rank() == 0:
        doratune.save(single, folder / "single")
    dist.barrier()
    single = doratune.load(whole("biased"), folder / "single", trainable=True)
    model = doratune.load(split("biased", folder), folder / "single", trainable=True)
    found = {"loaded": apart(logits(model), logits(single)), "placed": placed(model)}
    doratune.save(model, folder / "saved")
    dist.barrier()
    found["saved"] = apart(logits(doratune.load(whole("biased"), folder / "saved")), logits(single))
    found["verify"] = str(doratune.verify(model)), str(doratune.verify(single))
    found["inspect"] = doratune.inspect(model).table(), doratune.inspect(single).table()
    found["merged state"] = distance(doratune.merged_state_dict(model), doratune.merged_state_dict(single))
    found["generated"] = [m.generate(ids(0)[:, :5], max_new_tokens=5, do_sample=False).tolist() for m in (model, single)]
    before, live = parts(model), logits(model)
    doratune.merge(model)
    found["merged"] = apart(logits(model), live)
    doratune.unmerge(model)
    after = parts(model)
    found["back"] = before.keys() == after.keys() and all(torch.equal(before[key], t) for key, t in after.items())
    found["goes on"] = train(single, split=False), train(model, split=False)
    found["clipped"] = [clipped(m) for m in (model, single)]
    doratune.merge(model, keep="none")
    live = logits(model)
    model.save_pretrained(folder / "merged")
    dist.barrier()
    found["exported"] = apart(logits(AutoModelForCausalLM.from_pretrained(folder / "merged")), live)
    return found


def parts(model):
    return {key: (t.to_local() if isinstance(t, DTensor) else t).clone() for key, t in model.state_dict().items()}


def placed(model):
    """How A, B and m of a layer split by rows and of one split by columns lie."""
    layers = model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.down_proj
    return [[str(p.placements[0]) for p in (layer.lora_A, layer.lora_B, layer.magnitude)] for layer in layers]


def clipped(model):
    model(input_ids=ids(9), labels=ids(9)).loss.backward()
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    model.zero_grad()
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


@case
def others(folder):
    """Taking off, several adapters, another dtype, edits, rows whose norm cancels."""
    model, found = split("biased", folder), {}
    layer, before = model.model.layers[0].mlp.down_proj, logits(model)
    state, forward = (layer.weight, vars(layer)["forward"]), vars(layer)["forward"]
    train(attached(model), split=False, steps=1)
    trained = logits(model)
    doratune.attach(model, doratune.AdapterConfig(rank=2), name="other")
    found["other"] = torch.equal(logits(model), before) and not torch.equal(trained, before)
    doratune.use(model, "default")
    found["used"] = torch.equal(logits(model), trained)
    model.load_state_dict(model.state_dict())
    doratune.refresh(model)
    found["refreshed"] = torch.equal(logits(model), trained)
    for adapter in ("default", "other"):
        doratune.use(model, adapter)
        doratune.detach(model)
    found["detached"] = torch.equal(logits(model), before) and layer.weight is state[0] and vars(layer)["forward"] is forward
    model, plain = attached(split("plain", folder)), split("plain", folder)
    model.to(torch.bfloat16)
    found["bf16"] = torch.equal(logits(model), logits(plain.to(torch.bfloat16)))
    found["fp32"] = sorted({str(p.dtype) for p in model.parameters() if p.requires_grad})
    found["cancels"], found["edited"] = extremes(folder)
    return found


def extremes(folder):
    """Norms that cancel: V is a thousandth of W in some rows. Then `.data` edits in every process."""
    single = attached(whole("plain"))
    with torch.no_grad():
        for _, layer in doratune.adapters(single):
            layer.lora_A.copy_(layer.weight[:4])
            layer.lora_B[:4] = -0.99 * torch.eye(4) / layer.scaling
    if dist.get_rank() == 0:
        doratune.save(single, folder / "cancels")
    dist.barrier()
    model = doratune.load(split("plain", folder), folder / "cancels", trainable=True)
    cancels = train(single, split=False), train(model, split=False)
    for one in (single, model):
        for _, layer in doratune.adapters(one):
            layer.lora_B.data.mul_(2.0)
            layer.magnitude.data.mul_(1.5)
    return cancels, apart(logits(model), logits(single))


@case
def sent(folder):
    """Numbers of each all-reduce that is not the plan's own: of one step, and of attaching."""
    found = {}
    for method in ("lora", "dora"):
        with Collectives() as mode:
            model = attached(split("plain", folder), method=method)
        found[f"{method}, attach"] = [size for name, size in mode.seen if "_wrap" not in name]
        optimizer = torch.optim.AdamW(doratune.parameter_groups(model, lr=1e-2))
        train(model, split=False, steps=1, optimizer=optimizer)
        with Collectives() as mode:
            train(model, split=False, steps=1, optimizer=optimizer)
        found[method] = sorted(size for name, size in mode.seen if name.startswith("c10d."))
        found[f"{method}, the plan's"] = sorted(size for name, size in mode.seen if not name.startswith("c10d."))
    return found


class Odd(nn.Module):
    """Nothing divides by two."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.up, self.down = nn.Linear(9, 7), nn.Linear(7, 5)

    def forward(self, input_ids, labels):
        x = torch.nn.functional.one_hot(input_ids % 9, 9).float()
        return _Loss((self.down(torch.tanh(self.up(x))) - labels[..., None] / 300).square().mean())


class _Loss:
    def __init__(self, loss):
        self.loss = loss


@case
def uneven(folder):
    mesh, found = init_device_mesh("cpu", (2,)), {}
    for name in ("lora", "dora", "dora, full gradient", "dora, input axis, full gradient"):
        single = attached(Odd(), **METHODS[name])
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        model = attached(parallelize_module(Odd(), mesh, plan), **METHODS[name])
        found[name] = train(single, split=False), train(model, split=False)
        found[name] += (distance(doratune.merged_state_dict(model), doratune.merged_state_dict(single)),)
    return found


@case
def refused(folder):
    found, mesh = {}, init_device_mesh("cpu", (2,))

    def twice_late():
        model = attached(split("plain", folder))
        train(fully_shard(model, mesh=model._device_mesh["fsdp"]), split=False, steps=1)

    def twice_early():
        model = split("plain", folder)
        attached(fully_shard(model, mesh=model._device_mesh["fsdp"]))

    def one_row():
        attached(parallelize_module(nn.Sequential(nn.Linear(4, 1)), mesh, {"0": ColwiseParallel()}), rank=1)

    def disabled():
        with doratune.disabled(attached(split("plain", folder))):
            pass

    def mixed():
        with doratune.mixed(attached(split("plain", folder)), ["default", None]):
            pass

    calls = {"twice, late": twice_late, "twice, early": twice_early, "one row": one_row, "disabled": disabled, "mixed": mixed}
    for name, settings in {
        "dvora": {"method": "dvora"},
        "loha": {"method": "loha"},
        "embedding": {"targets": ["embed_tokens"]},
        "start": {"start": "pissa"},
        "also_train": {"also_train": ["lm_head"], "targets": ["q_proj"]},
    }.items():
        calls[name] = lambda settings=settings: attached(split("plain", folder), **settings)
    for name, call in calls.items():
        found[name] = refusal(call)
    return found


if __name__ == "__main__":
    run()
