"""What two processes do in the tests of this folder: `torchrun worker.py OUT case …`; the first writes OUT.0, case → what it found.

Each case trains, saves or merges with both processes on halves of a batch, and the same in one process on the whole batch.
"""

import functools
import gc
import json
import sys
import threading
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from conftest import randomize, tiny_gpt2, tiny_llama
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import doratune
import doratune.errors

CASES = {}
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def case(function):
    CASES[function.__name__] = function
    return function


def ids(step):
    return torch.randint(3, 300, (4, 20), generator=torch.Generator().manual_seed(step))


def half(batch):
    return batch.chunk(2)[dist.get_rank()]


def train(model, split, steps=3, first=0, optimizer=None):
    """Losses of the whole batch."""
    optimizer = optimizer or torch.optim.AdamW(doratune.parameter_groups(model, lr=1e-2))
    losses = []
    for step in range(first, first + steps):
        batch = half(ids(step)) if split else ids(step)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if split:
            dist.all_reduce(mean)
            mean /= 2
        losses.append(mean.item())
    return losses


def base(**settings):
    return tiny_llama(**settings).train()


def attached(model=None, **settings):
    return doratune.attach(model or base(), doratune.AdapterConfig(**{"rank": 4, "seed": 3} | settings))


def shard(model, **settings):
    for block in model.model.layers:
        fully_shard(block, **settings)
    return fully_shard(model, **settings)


def columns(p):
    """Matrices by columns, where they divide."""
    return Shard(1) if p.dim() == 2 and p.shape[1] % 2 == 0 else Shard(0)


def quantized(model):
    import bitsandbytes as bnb

    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    new = bnb.nn.Linear4bit(
                        linear.in_features, linear.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32
                    )
                    new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
                    setattr(parent, name, new.to("cpu"))
    return model


METHODS = {
    "lora": {"method": "lora"},
    "dora": {},
    "dora, full gradient": {"norm_gradient": "full"},
    "dora, input axis": {"magnitude_axis": "input"},
    "dora, input axis, full gradient": {"magnitude_axis": "input", "norm_gradient": "full"},
    "dora, relative": {"magnitude_form": "relative"},
    "dvora": {"method": "dvora"},
    "dora, pissa": {"start": "pissa"},
    "dora, whole head": {"also_train": ["lm_head"], "exclude": ["k_proj"]},
}


@functools.cache
def of_one_process(name="dora", steps=3):
    """Losses of a method on the whole batch."""
    return train(attached(**METHODS[name]), split=False, steps=steps)


@case
def ddp():
    found = {}
    for name, settings in METHODS.items():
        expected = of_one_process(name)
        model = nn.parallel.DistributedDataParallel(attached(**settings))
        found[name] = expected, train(model, split=True)
    return found


@case
def fsdp():
    found = {}
    for name, settings in METHODS.items():
        expected = of_one_process(name)
        model = shard(attached(**settings))
        found[name] = expected, train(model, split=True)
        layers = [layer.adapted for _, layer in doratune.adapters(model)]
        found[name] += ([weight.preparations for weight in layers],)
    return found


def each_layer(model):
    for module in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        fully_shard(module)
    return fully_shard(model)


def checkpointed(model):
    from torch.utils.checkpoint import checkpoint

    for block in model.model.layers:
        plain = block.forward
        block.forward = lambda *args, plain=plain, **kwargs: checkpoint(plain, *args, use_reentrant=False, **kwargs)
    return shard(model)


@case
def ways_of_sharding():
    ways = {
        "whole model at once": lambda model: fully_shard(model),
        "not resharded after the forward": lambda model: shard(model, reshard_after_forward=False),
        "offloaded": lambda model: shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False)),
        "by columns": lambda model: shard(model, shard_placement_fn=columns),
        "each layer": lambda model: fully_shard([fully_shard(m) for m in model.modules() if isinstance(m, nn.Linear)] and model),
        "checkpointed": lambda model: (
            shard(model) if model.gradient_checkpointing_enable({"use_reentrant": False}) is None else None
        ),
    }
    found = {}
    expected = of_one_process()
    for name, way in ways.items():
        model = way(attached())
        found[name] = expected, train(model, split=True), [layer.adapted.preparations for _, layer in doratune.adapters(model)]
    return found


@case
def attached_after_sharding():
    found = {}
    for name in ("lora", "dora", "dora, full gradient", "dora, input axis", "dora, relative", "dvora"):
        expected = of_one_process(name)
        for way, settings in {"rows": {}, "columns": {"shard_placement_fn": columns}}.items():
            model = attached(shard(base(), **settings), **METHODS[name])
            layer = model.model.layers[0].mlp.up_proj
            placed = all(isinstance(p, DTensor) for p in layer.parameters())
            found[f"{name}, {way}"] = expected, train(model, split=True), placed
    model = shard(base())
    train_forward = model(input_ids=ids(0)).logits.detach()  # it has run already
    attached(model)
    same = torch.equal(train_forward, model(input_ids=ids(0)).logits)
    found["dora, after a run"] = of_one_process(), train(model, split=True), same
    return found


AT_THE_ROOT = {
    "head": {"targets": ["lm_head", "q_proj"]},
    "embedding": {"targets": ["embed_tokens", "q_proj"]},
    "blocks alone": {"targets": ["q_proj", "down_proj"]},
    "head, input axis, relative": {"targets": ["lm_head", "v_proj"], "magnitude_axis": "input", "magnitude_form": "relative"},
}
RESHARDED = {"resharded": {"reshard_after_forward": True}, "not resharded": {"reshard_after_forward": False}, "as it comes": {}}


def ran(model, how):
    """The model after a forward, which leaves copies in the place of the root's parameters."""
    if how == "verify":
        doratune.verify(model)
    elif how == "begun ahead":
        for module in [model, *model.model.layers]:
            module.unshard(async_op=True)
    elif how:
        with torch.set_grad_enabled(how == "with gradients"):
            model(input_ids=ids(0)).logits.sum()
    return model


@case
def after_a_forward():
    """What ran before attaching, and before the optimizer is made."""
    found = {}
    orders = [("", "without gradients"), ("with gradients", ""), ("without gradients", "with gradients"), ("begun ahead", "verify")]
    orders += [(None, "with gradients"), (None, "begun ahead")]
    for name, settings in AT_THE_ROOT.items():
        expected = train(attached(**settings), split=False, steps=2)
        for number, (before, then) in enumerate(orders):
            way = list(RESHARDED)[(number + len(found)) % 3]
            sharding = RESHARDED[way]
            early = before is None  # attached before sharding
            model = shard(attached(**settings) if early else base(), **sharding)
            model = model if early else attached(ran(model, before), **settings)
            key = f"{name}, {'attached first' if early else before or 'nothing'}, {then or 'nothing'}, {way}"
            found[key] = expected, train(ran(model, then), split=True, steps=2)
    return found


@case
def calls_after_a_forward():
    """What writes into a model whose last call left copies in it, beside the same of one process; and an optimizer between a
    forward and its backward."""
    from doratune.checkpoint.adapter import load_weights

    found = {}
    for name in ("head", "embedding"):
        settings = AT_THE_ROOT[name]
        single, model = attached(**settings), ran(shard(base(), reshard_after_forward=False), "with gradients")
        trainable = {key: p.requires_grad for key, p in shard(base()).named_parameters()}
        attached(model, **settings)
        path = OUT.parent / f"called {name}"
        randomize(single)
        if dist.get_rank() == 0:
            doratune.save(single, path)
        dist.barrier()
        load_weights(single, path)  # a file has no B for rows without direction
        load_weights(ran(model, "with gradients"), path)
        case = found[name] = {"loaded": far(model, single)}
        doratune.merge(ran(model, "with gradients"))
        doratune.merge(single)
        for module in [model, *model.model.layers]:
            module.reshard()
        case["merged"] = distance(model.state_dict(), single.state_dict())
        doratune.unmerge(ran(model, "with gradients"))
        doratune.unmerge(single)
        case["back"] = far(model, single)
        doratune.attach(ran(model, "with gradients"), doratune.AdapterConfig(rank=4, **settings), name="other")
        doratune.use(ran(model, "with gradients"), "default")
        case["in use again"] = far(model, single)
        case["steps"] = train(single, split=False, steps=2), two_steps(model)
        doratune.delete(ran(model, "with gradients"), "default")
        doratune.use(model, None)
        now = {key: p.requires_grad for key, p in model.named_parameters()}
        case["as before"] = now == trainable and all(isinstance(p, DTensor) for p in model.parameters())
    return found


def two_steps(model):
    """Losses; the optimizer is made between the first forward and its backward."""
    batch = half(ids(0))
    loss = model(input_ids=batch, labels=batch).loss
    optimizer = torch.optim.AdamW(doratune.parameter_groups(model, lr=1e-2))
    doratune.inspect(model)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return [mean.item() / 2, *train(model, split=True, steps=1, first=1, optimizer=optimizer)]


def far(model, single):
    with torch.no_grad():
        return (model(input_ids=ids(0)).logits - single(input_ids=ids(0)).logits).abs().max().item()


@case
def mixed_precision():
    found = {}
    for late in (False, True):
        plain = shard(base(), mp_policy=BF16)
        model = shard(base(), mp_policy=BF16) if late else base()
        attached(model, targets="all-linear")
        model = model if late else shard(model, mp_policy=BF16)
        with torch.no_grad():
            same = torch.equal(plain(input_ids=ids(0)).logits, model(input_ids=ids(0)).logits)
        losses = train(model, split=True)
        seen = {str(p.dtype) for p in model.parameters() if p.requires_grad}
        found["late" if late else "early"] = same, losses, sorted(seen)
    with torch.autocast("cpu", torch.bfloat16):
        found["expected"] = train(attached(targets="all-linear"), split=False)
    return found


@case
def nf4():
    expected = train(attached(quantized(base())), split=False)
    model = shard(attached(quantized(base())))
    return expected, train(model, split=True), [layer.adapted.preparations for _, layer in doratune.adapters(model)]


def mixtral():
    from transformers import AutoModelForCausalLM, MixtralConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(**sizes, num_key_value_heads=1, head_dim=8, num_experts_per_tok=2, num_local_experts=4)
    return AutoModelForCausalLM.from_config(config, experts_implementation="eager").train()


OTHERS = {
    "Conv1D": (lambda: tiny_gpt2().eval(), {}),
    "Conv1D, input axis": (lambda: tiny_gpt2().eval(), {"magnitude_axis": "input"}),
    "embedding": (base, {"targets": ["embed_tokens", "q_proj"]}),
    "embedding, by dimension": (base, {"targets": ["embed_tokens", "q_proj"], "embedding_magnitude": "dimension"}),
    "experts": (mixtral, {"targets": ["gate_up_proj", "down_proj", "q_proj"], "rank": 2}),
}


@case
def other_layers():
    found = {}
    for name, (make, settings) in OTHERS.items():
        expected = train(attached(make(), **settings), split=False)
        for late in (False, True):
            key = f"{name}, {'after' if late else 'before'}"
            model = make() if late else attached(make(), **settings)
            for block in model.transformer.h if hasattr(model, "transformer") else model.model.layers:
                fully_shard(block)
            fully_shard(model)
            try:
                model = attached(model, **settings) if late else model
                found[key] = expected, train(model, split=True)
            except Exception as error:
                found[key] = expected, f"{type(error).__name__}: {error}"
                if dist.get_rank() == 0:
                    traceback.print_exc()
    return found


class Collectives(TorchDispatchMode):
    """(name, numbers) of every collective."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if name.startswith(("c10d.", "_c10d_functional.")) and "wait" not in name:
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            self.seen.append((name, max((t.numel() for t in tensors), default=0)))
        return function(*args, **(kwargs or {}))


@case
def collectives():
    """Of a step of DoRA and of the same step of LoRA, and of attaching to shards."""
    found = {}
    for method in ("dora", "lora"):
        model = shard(attached(method=method))
        optimizer = torch.optim.AdamW(doratune.parameter_groups(model, lr=1e-2))
        train(model, split=True, optimizer=optimizer, steps=1)
        with Collectives() as mode:
            train(model, split=True, optimizer=optimizer, steps=1)
        found[method] = mode.seen
    numbers = sum(p.numel() for p in attached().parameters() if p.dim() == 1 and p.requires_grad)
    found["magnitudes"] = numbers
    for way, settings in {"rows": {}, "columns": {"shard_placement_fn": columns}}.items():
        model = shard(base(), **settings)
        with Collectives() as mode:
            attached(model)
        found[f"attach, {way}"] = mode.seen
    found["largest"] = max(layer.adapted.shape[0] for _, layer in doratune.adapters(model))
    return found


def deep():
    """Six layers, in which nearly all its numbers are."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=300, pad_token_id=0, **sizes)).train()


def storages(tensors):
    """Address → bytes, of this process's parts."""
    parts = [getattr(t, "_local_tensor", t).untyped_storage() for t in tensors]
    return {part.data_ptr(): part.nbytes() for part in parts}


@case
def memory():
    """Between two steps: bytes of this process's parameters, and of all tensors beside them."""
    found = {}
    for name, settings in METHODS.items():
        if name == "dora, pissa" or "whole" in name:
            continue
        model = shard(attached(deep(), **settings))
        optimizer = torch.optim.SGD(doratune.parameter_groups(model, lr=1e-2))
        train(model, split=True, steps=1, optimizer=optimizer)
        gc.collect()
        own = storages(model.parameters())
        every = storages(t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.device.type == "cpu")
        found[name] = sum(own.values()), sum(size for address, size in every.items() if address not in own)
    return found


@case
def whole_files():
    """save, verify, inspect, merge and merged_state_dict of a sharded model are those of the whole one."""
    folder, found = OUT.parent, {}
    for name in ("dora", "lora", "dora, relative", "dvora", "dora, input axis", "dora, whole head"):
        single = randomize(attached(**METHODS[name]))
        model = shard(randomize(attached(**METHODS[name])))
        for steps in (0, 1):  # before any run, and after
            if steps:
                train(single, split=False, steps=1)
                train(model, split=True, steps=1)
            key = f"{name}, {steps}"
            doratune.save(model, folder / f"{key} sharded")
            if dist.get_rank() == 0:
                doratune.save(single, folder / f"{key} single")
            found[key] = {
                "verify": (str(doratune.verify(model)), str(doratune.verify(single))),
                "inspect": (doratune.inspect(model).table(), doratune.inspect(single).table()),
                "merged state": distance(doratune.merged_state_dict(model), doratune.merged_state_dict(single)),
            }
        before = {key: t.to_local().clone() for key, t in model.state_dict().items()}
        live = model(input_ids=ids(0)).logits.detach()
        doratune.merge(model)
        doratune.merge(single)
        merged = model(input_ids=ids(0)).logits.detach()
        found[key]["merge"] = distance(model.state_dict(), single.state_dict()), (live - merged).abs().max().item()
        doratune.save(model, folder / f"{key} merged")
        doratune.unmerge(model)
        found[key]["back"] = all(torch.equal(before[k], t.to_local()) for k, t in model.state_dict().items())
        found[key]["goes on"] = train(model, split=True, steps=1)
        if "whole" in name:
            found[key]["detached"] = refusal(doratune.detach, model)
            continue
        doratune.detach(model)
        found[key]["detached"] = sorted(model.state_dict()) == sorted(base().state_dict()), train_free(model)
    return found


def refusal(call, *arguments):
    try:
        call(*arguments)
    except doratune.errors.UserError as error:
        return str(error)


def train_free(model):
    """The plain model runs."""
    return bool(torch.equal(model(input_ids=ids(0)).logits, base()(input_ids=ids(0)).logits))


def distance(state, other):
    full = {key: t.full_tensor() if isinstance(t, DTensor) else t for key, t in state.items()}
    return sorted(full) == sorted(other) and max((full[key] - other[key]).abs().max().item() for key in other)


@case
def loaded_into_shards():
    """An adapter that one process saved, loaded before and after sharding."""
    folder, found = OUT.parent, {}
    for name in ("dora", "dora, relative", "dvora"):
        single = randomize(attached(**METHODS[name]))
        path = folder / f"loaded {name}"
        if dist.get_rank() == 0:
            doratune.save(single, path)
        dist.barrier()
        expected = single(input_ids=ids(0)).logits
        model = doratune.load(shard(base()), path)
        found[name] = (model(input_ids=ids(0)).logits - expected).abs().max().item()
    return found


@case
def loaded_in_shards():
    """transformers' own loading into shards, one slice after the other, and the adapter over it."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    folder = OUT.parent / "base"
    if dist.get_rank() == 0:
        base().save_pretrained(folder)
    dist.barrier()
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2)).train()
    attached(model)
    placed = all(isinstance(p, DTensor) for p in model.parameters())
    losses = train(model, split=True)
    own = sum(p.to_local().nbytes for p in model.parameters())
    return of_one_process(), losses, placed, own, sum(p.numel() * p.element_size() for p in model.parameters())


def odd():
    """Sizes that two cannot divide, but the heads'."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 301, "hidden_size": 33, "intermediate_size": 45, "num_hidden_layers": 3, "num_attention_heads": 3}
    return LlamaForCausalLM(LlamaConfig(**sizes, head_dim=8, num_key_value_heads=1, pad_token_id=0)).train()


STORED = {
    "odd sizes, several files": (odd, {}, "float32"),
    "bf16 in the files": (lambda: base().bfloat16(), {}, "float32"),
    "tied, Conv1D": (lambda: tiny_gpt2().eval(), {}, "float32"),
    "experts beside it": (mixtral, {"targets": ["q_proj", "o_proj"]}, "float32"),
    "rank below the processes": (base, {"rank": 1, "targets": "all-linear"}, "float32"),
    "head": (base, {"targets": ["lm_head", "q_proj"]}, "float32"),
    "input axis": (base, {"magnitude_axis": "input"}, "float32"),
    "in bf16": (base, {"targets": "all-linear"}, "bfloat16"),
}


@case
def own_parts():
    """Each process reads its own part of a base: the start beside a whole base's, the parts' share of its bytes, losses of both."""
    from doratune.support.models import load_model
    from doratune.support.shards import blocks_of, skeleton_of

    found = {}
    for number, (name, (make, settings, dtype)) in enumerate(STORED.items()):
        folder = OUT.parent / f"stored {number}"
        if dist.get_rank() == 0:
            make().save_pretrained(folder, max_shard_size="30KB")
        dist.barrier()
        whole = attached(load_model(str(folder), dtype), **settings)
        blocks = blocks_of(skeleton_of(str(folder)))
        parts = attached(load_model(str(folder), dtype, blocks=blocks), **settings)
        share = sum(p.to_local().nbytes for p in parts.parameters()) / sum(p.nbytes for p in whole.parameters())
        doratune.verify(parts)
        with torch.no_grad():
            same = torch.equal(whole(input_ids=ids(0)).logits, parts(input_ids=ids(0)).logits)
        doratune.save(parts, folder / "parts")
        if dist.get_rank() == 0:
            doratune.save(whole, folder / "whole")
        found[name] = same, share, train(whole, split=False), train(parts, split=True)
    return found


class PeakMemory:
    """Largest anonymous memory of this process above what it had at first, in bytes; looked at all the time."""

    def __enter__(self):
        gc.collect()
        self.start = self.most = self.now()
        self.end = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    @staticmethod
    def now():
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

    def watch(self):
        while not self.end.wait(0.002):
            self.most = max(self.most, self.now())

    def __exit__(self, *_):
        self.end.set()
        self.thread.join()
        self.bytes = self.most - self.start


@case
def memory_of_loading():
    """Of a run until its first step, in fp32 from files in bf16: loaded in parts, and whole before it is sharded."""
    from doratune.training.methods import method_of
    from doratune.training.recipe import TrainRecipe

    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "vocab_size": 300}

    def peak(layers, fsdp):
        folder = OUT.parent / f"{layers} layers"
        if dist.get_rank() == 0 and not folder.exists():
            LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes)).bfloat16().save_pretrained(folder)
        dist.barrier()
        method = method_of(TrainRecipe(model=str(folder), data="-", dtype="float32", targets="all-linear", fsdp=fsdp, rank=4))
        with PeakMemory() as memory:
            model = method.load(said.append)
            loaded = memory.most - memory.start
            method.prepare(model)
            if fsdp == "none":
                shard(model)
        return loaded, memory.bytes, sum(p.numel() * p.element_size() for p in model.parameters())

    said = []
    for fsdp in ("shard", "none"):
        peak(1, fsdp)  # what libraries need for themselves
    return peak(12, "shard"), peak(12, "none"), said


@case
def checkpoints_of_pytorch():
    """torch.distributed.checkpoint: written in shards by two processes, read by each alone and whole."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    folder = OUT.parent / "distributed checkpoint"

    def both(model, optimizer):
        state, optimizer_state = get_state_dict(model, optimizer)
        return {"model": state, "optimizer": optimizer_state}

    def optimizer_of(model):
        return torch.optim.AdamW(doratune.parameter_groups(model, lr=1e-2))

    model = shard(attached())
    optimizer = optimizer_of(model)
    train(model, split=True, steps=2, optimizer=optimizer)
    dcp.save(both(model, optimizer), checkpoint_id=folder)
    dist.barrier()
    found = {"expected": of_one_process(steps=4)[2:]}
    for name, new, split in (("sharded", shard(attached(seed=9)), True), ("whole", attached(seed=9), False)):
        optimizer = optimizer_of(new)
        state = both(new, optimizer)
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(new, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        found[name] = train(new, split=split, steps=2, first=2, optimizer=optimizer)
    return found


@case
def other_engines():
    """FSDP1, and tensor-parallel weights."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    found = {}
    for original in (True, False):
        try:
            model = attached()
            policy = ModuleWrapPolicy({type(model.model.layers[0])})
            device = torch.device("cpu")
            wrapped = FullyShardedDataParallel(model, use_orig_params=original, auto_wrap_policy=policy, device_id=device)
            found[f"FSDP1, {original}"] = train(wrapped, split=True)
        except Exception as error:
            found[f"FSDP1, {original}"] = f"{type(error).__name__}: {error}"
    mesh = init_device_mesh("cpu", (2,))
    model = base()
    for block in model.model.layers:
        plan = {"mlp.up_proj": ColwiseParallel(), "mlp.gate_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}
        parallelize_module(block, mesh, plan)
    try:
        attached(model, method="dvora")
    except Exception as error:
        found["tensor parallel"] = f"{type(error).__name__}: {error}"
    attached(model, targets=["q_proj", "v_proj"])
    found["beside them"] = train(model, split=False), train(attached(targets=["q_proj", "v_proj"]), split=False)
    return found


@case
def refusals():
    from doratune.errors import UserError

    found = {}
    for name, settings in {"start": {"start": "pissa"}, "also_train": {"also_train": ["lm_head"], "targets": ["q_proj"]}}.items():
        try:
            attached(shard(base()), **settings)
        except UserError as error:
            found[name] = str(error)
    return found


def run():
    """The cases of the command line."""
    global OUT
    torch.set_num_threads(1)
    OUT = Path(sys.argv[1])
    dist.init_process_group("gloo")
    results = {}
    for name in sys.argv[2:]:
        try:
            results[name] = CASES[name](OUT.parent) if CASES[name].__code__.co_argcount else CASES[name]()
        except BaseException:
            results[name] = {"error": traceback.format_exc()}
            break
    if dist.get_rank() == 0 or "error" in results[name]:
        OUT.with_suffix(f".{dist.get_rank()}").write_text(json.dumps(results))
    if "error" in results[name]:
        sys.exit(results[name]["error"])
    dist.destroy_process_group()


if __name__ == "__main__":
    run()
