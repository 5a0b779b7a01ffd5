"""Modules that are trained whole: fp32 parameters, the base's output, and everything that moves, copies, saves or reads them."""

import copy
import inspect
import io

import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import doratune
from doratune import AdapterConfig
from doratune.checkpoint.merge import merge_checkpoint
from doratune.errors import UserError

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
LOW = [torch.bfloat16, torch.float16]
MODULES = {"head": "lm_head", "embedding": "embed_tokens", "norm": "norm", "block": "layers.1"}


def attached(model, *names, targets=("q_proj",), **config):
    return doratune.attach(model, AdapterConfig(rank=2, targets=targets, also_train=list(names), **config))


def whole_of(model):
    record = vars(model)["_doratune"]
    return {f"{name}.{key}": p for name in record.also_train for key, p in model.get_submodule(name).named_parameters()}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def net(*layers, dtype=torch.bfloat16):
    """A layer to be adapted in front of the ones of interest."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), *layers).to(dtype)


def nudge(model, by=1e-4):
    """Move what is trained whole by less than bf16 can say."""
    with torch.no_grad():
        for p in whole_of(model).values():
            p.add_(by * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return model


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("dtype", [*LOW, torch.float32, torch.float64])
def test_the_start_is_the_base_bit_for_bit(dtype, kind, autocast):
    model = tiny_llama(dtype=dtype)

    def output():
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            return model(input_ids=IDS).logits

    expected = output().detach()
    attached(model, MODULES[kind])
    assert {p.dtype for p in whole_of(model).values()} == {torch.float64 if dtype == torch.float64 else torch.float32}
    got = output()
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)
    got.float().square().mean().backward()
    assert all(p.grad.any() for p in whole_of(model).values())
    with torch.no_grad():
        assert torch.equal(output(), expected)
    assert all(isinstance(p, nn.Parameter) for p in whole_of(model).values())


@pytest.mark.parametrize("kind", MODULES)
def test_small_steps_add_up_as_in_fp32(kind):
    def trained(model):
        attached(model, MODULES[kind])
        start = {name: p.detach().clone() for name, p in whole_of(model).items()}
        optimizer = torch.optim.AdamW(whole_of(model).values(), lr=1e-5, weight_decay=0.0)
        generator = torch.Generator().manual_seed(0)
        for _ in range(100):
            ids = torch.arange(300)[torch.randperm(300, generator=generator)].view(6, 50)
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return {name: p.detach() - start[name] for name, p in whole_of(model).items()}

    low, wide = trained(tiny_llama(dtype=torch.bfloat16)), trained(tiny_llama(dtype=torch.bfloat16).float())
    entries = torch.cat([t.flatten() for t in low.values()])
    assert (entries != 0).float().mean() > 0.95
    for name, moved in low.items():
        assert F.cosine_similarity(moved.flatten(), wide[name].flatten(), 0) > 0.9


def test_fp16_gradients_do_not_become_nan():
    """ε = 1e-8 is 0 in fp16 (0/0 for every token that was not seen), and a gradient above 256 squared is infinite."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)).half()
    attached(model, "0", "2", "3", targets=["1"])
    optimizer = torch.optim.AdamW(doratune.parameter_groups(model, lr=1e-3))
    for _ in range(3):
        y = model(torch.arange(10))
        optimizer.zero_grad()
        (y.float().sum() * 1024).backward()
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert torch.isfinite(model(torch.arange(20))).all()
    assert doratune.verify(model).ok


@pytest.mark.parametrize("dtype", LOW)
def test_saved_in_fp32_and_loaded_here_and_in_peft(dtype, tmp_path):
    import peft

    model = nudge(attached(tiny_llama(dtype=dtype), "lm_head", "model.norm", "layers.1"), 1e-2)
    expected = logits(model)
    doratune.save(model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for name, p in whole_of(model).items():
        key = f"base_model.model.{name}"
        assert saved[key].dtype == torch.float32
        assert torch.equal(saved[key], p)
    again = doratune.load(tiny_llama(dtype=dtype), tmp_path)
    assert torch.equal(logits(again), expected)
    assert all(torch.equal(p, whole_of(model)[name]) for name, p in whole_of(again).items())
    theirs = peft.PeftModel.from_pretrained(tiny_llama(dtype=dtype), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), expected, rtol=0.02, atol=0.02)


def test_a_folder_that_was_written_in_bf16_is_loaded_into_fp32(tmp_path):
    from safetensors.torch import save_file

    model = attached(tiny_llama(dtype=torch.bfloat16), "lm_head")
    doratune.save(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: t.bfloat16() if "lm_head" in k else t for k, t in load_file(path).items()}, path)
    again = doratune.load(tiny_llama(dtype=torch.bfloat16), tmp_path, trainable=True)
    assert again.lm_head.weight.dtype == torch.float32
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("tie", [False, True])
def test_merged_on_disk_in_the_dtype_of_the_base(tie, tmp_path):
    from transformers import AutoModelForCausalLM

    tiny_llama(dtype=torch.bfloat16, tie=tie).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16).eval()
    nudge(attached(model, "lm_head", "norm"), 1e-2)
    doratune.save(model, tmp_path / "adapter")
    merge_checkpoint(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert torch.equal(tensors["lm_head.weight"], model.lm_head.weight.bfloat16())
    merge_checkpoint(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "wide", dtype="float32")
    assert torch.equal(load_file(tmp_path / "wide" / "model.safetensors")["lm_head.weight"], model.lm_head.weight)
    doratune.merge(model)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    assert torch.equal(logits(merged), logits(model))


@pytest.mark.parametrize("dtype", LOW)
def test_merge_and_unmerge_in_memory(dtype, tmp_path):
    model = nudge(attached(tiny_llama(dtype=dtype), "lm_head", "layers.1"))
    before, values, expected = whole_of(model), {k: p.detach().clone() for k, p in whole_of(model).items()}, logits(model)
    doratune.merge(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(logits(model), expected)  # B = 0
    doratune.save(model, tmp_path / "merged")
    copied = copy.deepcopy(model)
    doratune.unmerge(model)
    doratune.unmerge(copied)
    assert all(p is before[name] and torch.equal(p, values[name]) for name, p in whole_of(model).items())
    assert all(torch.equal(p, values[name]) for name, p in whole_of(copied).items())
    doratune.save(model, tmp_path / "unmerged")
    merged, unmerged = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("merged", "unmerged"))
    assert all(torch.equal(t, unmerged[key]) and t.dtype == torch.float32 for key, t in merged.items())
    assert torch.equal(logits(model), expected)


def test_a_dtype_change_while_merged_is_kept():
    model = nudge(attached(tiny_llama(dtype=torch.bfloat16), "lm_head"))
    value = model.lm_head.weight.detach().clone()
    doratune.merge(model)
    model.half()
    expected = model.lm_head.weight.detach().clone()
    assert expected.dtype == torch.float16
    doratune.unmerge(model)
    assert model.lm_head.weight.dtype == torch.float32
    assert torch.equal(model.lm_head.weight, value)
    assert logits(model).dtype == torch.float16


def test_merging_refuses_what_the_base_cannot_hold():
    for value, message in ((1e5, "overflows float16"), (float("nan"), "holds NaN or infinite")):
        model = attached(tiny_llama(dtype=torch.float16), "lm_head")
        with torch.no_grad():
            model.lm_head.weight[3, 4] = value
        with pytest.raises(UserError, match=rf"lm_head\.weight {message}"):
            doratune.merge(model)
        assert vars(model)["_doratune"].merged is None
        assert model.lm_head.weight.dtype == torch.float32


def test_a_quantized_layer_is_merged_into_what_the_model_computes_in():
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 300)).bfloat16()
    torchao.quantize_(model[0], torchao.Int8WeightOnlyConfig())
    attached(model, "1", targets=["0"])
    doratune.merge(model)
    assert model[0].weight.dtype == model[1].weight.dtype == torch.bfloat16
    model(torch.randn(2, 64).bfloat16())


def test_copies_and_pickles():
    model = nudge(attached(tiny_llama(dtype=torch.bfloat16), "lm_head", "layers.1"))
    expected = logits(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(logits(other), expected)
        nudge(other, 0.1)
        assert not torch.equal(logits(other), expected)
        assert doratune.verify(other).ok
        doratune.detach(other)
        assert torch.equal(logits(other), logits(tiny_llama(dtype=torch.bfloat16)))
    assert torch.equal(logits(model), expected)
    head = copy.copy(model.lm_head).half()
    assert head(torch.ones(1, 32).half()).dtype == torch.float16


def test_it_looks_like_its_class():
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    model = attached(tiny_llama(dtype=torch.bfloat16), "lm_head", "layers.1")
    block, head = model.model.layers[1], model.lm_head
    assert isinstance(block, LlamaDecoderLayer)
    assert isinstance(head, nn.Linear)
    assert (type(block).__name__, type(head).__name__) == ("LlamaDecoderLayer", "Linear")
    assert inspect.signature(block.forward) == inspect.signature(model.model.layers[0].forward)
    assert "trained whole, computes in bfloat16" in repr(head)


@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerates_hooks(when):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    def hook():
        add_hook_to_module(model.lm_head, ModelHook())

    model = tiny_llama(dtype=torch.bfloat16)
    expected = logits(model)
    if when == "before":
        hook()
    attached(model, "lm_head")
    if when == "after":
        hook()
    assert torch.equal(logits(model), expected)
    doratune.detach(model)
    assert torch.equal(logits(model), expected)
    remove_hook_from_module(model.lm_head)
    assert torch.equal(logits(model), expected)
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
def test_detach_gives_the_very_tensors_of_the_base(dtype):
    model = tiny_llama(dtype=dtype)
    before = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    classes = [type(module) for module in model.modules()]
    expected = logits(model)
    nudge(attached(model, *MODULES.values()), 0.1)
    doratune.detach(model)
    for name, p in model.named_parameters():
        assert p is before[name][0]
        assert p.data_ptr() == before[name][1]
        assert torch.equal(p, before[name][2])
    assert [type(module) for module in model.modules()] == classes
    assert not any("computes_in" in vars(module) for module in model.modules())
    assert torch.equal(logits(model), expected)


def test_a_failed_attach_leaves_the_base(monkeypatch):
    model = tiny_llama(dtype=torch.bfloat16)
    before, classes = dict(model.named_parameters()), [type(module) for module in model.modules()]
    monkeypatch.setattr("doratune.adapter.attach.adapt", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attached(model, "lm_head", "layers.1")
    assert all(p is before[name] for name, p in model.named_parameters())
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("names", [["layers.1"], ["model.layers", "embed_tokens"], ["lm_head", "norm"]])
def test_checkpointing_of_transformers(names, reentrant):
    def gradients(checkpointing):
        targets = ["lm_head"] if "model.layers" in names else ["q_proj"]
        model = nudge(attached(tiny_llama(dtype=torch.bfloat16), *names, targets=targets)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad for name, p in whole_of(model).items()}

    plain, again = gradients(False), gradients(True)
    assert all(torch.equal(g, again[name]) for name, g in plain.items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_inside_a_whole_module(reentrant):
    """Its second forward runs when the outer module's is over."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.scale = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), nn.Parameter(torch.ones(8))

        def forward(self, x, checkpointing=False):
            x = x * self.scale
            return checkpoint(self.inner, x, use_reentrant=reentrant) if checkpointing else self.inner(x)

    model = attached(net(Block()), "1", targets=["0"])
    x, results = torch.randn(4, 8).bfloat16(), []
    for checkpointing in (False, True):
        model.zero_grad()
        model[1](model[0](x), checkpointing).float().square().sum().backward()
        results.append([p.grad.clone() for p in model[1].parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(p.dtype == torch.float32 for p in model[1].parameters())


def test_an_exception_in_a_forward_leaves_the_parameters():
    model = attached(net(nn.Linear(8, 4)), "1", targets=["0"])
    with pytest.raises(RuntimeError):
        model[1](torch.randn(2, 7).bfloat16())
    assert model[1].weight.dtype == torch.float32
    assert isinstance(model[1].weight, nn.Parameter)


def test_moves_and_dtype_changes():
    model = nudge(attached(net(nn.Linear(8, 4)), "1", targets=["0"]))
    head, value, x = model[1], model[1].weight.detach().clone(), torch.randn(3, 8)
    head.weight.grad = torch.full_like(head.weight, 1e-3)
    for change, dtype in (
        (model.half, torch.float16),
        (model.bfloat16, torch.bfloat16),
        (lambda: model.to(torch.float16), torch.float16),
        (model.cpu, torch.float16),
        (model.float, torch.float32),
        (model.bfloat16, torch.bfloat16),
    ):
        parameter = head.weight
        change()
        assert head.weight is parameter
        assert head.weight.dtype == head.weight.grad.dtype == torch.float32
        assert torch.equal(head.weight, value)
        assert torch.equal(head.weight.grad, torch.full_like(value, 1e-3))
        with torch.no_grad():
            y = model(x.to(dtype))
            assert torch.equal(y, F.linear(model[0](x.to(dtype)), value.to(dtype), head.bias.to(dtype)))
    model.double()
    assert head.weight.dtype == torch.float64
    model.to(torch.bfloat16)
    assert torch.equal(head.weight, value)
    doratune.detach(model.half())
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_an_fp32_base_that_becomes_bf16_is_trained_in_fp32():
    model = attached(net(nn.Linear(8, 4), dtype=torch.float32), "1", targets=["0"]).bfloat16()
    assert model[1].weight.dtype == torch.float32
    assert model(torch.randn(2, 8).bfloat16()).dtype == torch.bfloat16
    assert doratune.verify(model).ok


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts(assign):
    model = nudge(attached(net(nn.Linear(8, 4)), "1", targets=["0"]))
    x = torch.randn(3, 8).bfloat16()
    state, expected = {k: t.clone() for k, t in model.state_dict().items()}, model(x)
    assert state["1.weight"].dtype == torch.float32
    other = attached(net(nn.Linear(8, 4)), "1", targets=["0"])
    other.load_state_dict(state, assign=assign)
    assert torch.equal(other[1].weight, model[1].weight)
    assert torch.equal(other(x), expected)
    other.load_state_dict({k: t.bfloat16() if k.startswith("1.") else t for k, t in state.items()}, assign=assign)
    assert other[1].weight.dtype == torch.float32
    assert torch.equal(other[1].weight, model[1].weight.bfloat16())
    assert other[1].weight.requires_grad
    assert torch.equal(other(x), expected)


def test_a_tied_model():
    model = tiny_llama(dtype=torch.bfloat16, tie=True)
    expected, original = logits(model), model.lm_head.weight
    attached(model, "lm_head")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.model.embed_tokens.weight is original
    assert torch.equal(logits(model), expected)
    doratune.detach(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight is original

    attached(model, "lm_head", "embed_tokens")  # both: still one parameter
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight is not original
    assert model.lm_head.weight.dtype == torch.float32
    assert torch.equal(logits(model), expected)
    doratune.merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    doratune.unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    doratune.detach(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight is original


def test_ties_inside_buffers_and_what_is_not_a_number():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)
            self.b.weight = self.a.weight
            self.more = nn.ParameterList([nn.Parameter(torch.randn(8))])
            self.index = nn.Parameter(torch.arange(8), requires_grad=False)
            self.register_buffer("order", torch.arange(8).flip(0))
            self.register_buffer("shift", torch.full((8,), 0.3))

        def forward(self, x):
            assert self.a.weight is self.b.weight
            assert next(self.a.parameters()).dtype == x.dtype
            return self.norm(self.b(self.a(x)) + self.more[0])[:, self.order] + self.shift + self.index

    model = net(Block())
    model[1].index.data = torch.arange(8)
    base, x = copy.deepcopy(model), torch.randn(16, 8).bfloat16()
    attached(model, "1", targets=["0"])
    block = model[1]
    assert block.a.weight is block.b.weight
    assert block.index.dtype == block.order.dtype == block.norm.num_batches_tracked.dtype == torch.int64
    assert not block.index.requires_grad
    assert block.shift.dtype == block.norm.running_mean.dtype == torch.bfloat16
    assert block.norm.weight.dtype == block.more[0].dtype == torch.float32
    for _ in range(2):
        assert torch.equal(model(x), base(x))
        assert torch.equal(block.norm.running_mean, base[1].norm.running_mean)
    model(x).float().square().sum().backward()
    assert block.a.weight.grad.any()
    assert block.more[0].grad.any()
    doratune.detach(model)
    assert not block.norm.num_batches_tracked.any()
    assert torch.equal(model.eval()(x), base.eval().apply(reset)(x))


def reset(module):
    if isinstance(module, nn.BatchNorm1d):
        module.reset_running_stats()


def test_recurrent_layers_keep_a_list_of_their_weights():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(8, 6)

        def forward(self, x):
            return self.lstm(x)[0]

    model = net(Last())
    x = torch.randn(3, 2, 8).bfloat16()
    expected = model(x)
    original = model[1].lstm._flat_weights[0]
    attached(model, "lstm", targets=["0"])
    assert torch.equal(model(x), expected)
    model(x).float().sum().backward()
    assert all(p.grad.any() and p.dtype == torch.float32 for p in model[1].lstm.parameters())
    with torch.no_grad():
        model[1].lstm.weight_ih_l0.mul_(2)
    assert not torch.equal(model(x), expected)
    doratune.detach(model)
    assert model[1].lstm._flat_weights[0] is original
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", ["self_attn.out_proj", "linear1", "norm2", "self_attn", ""])
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_pytorchs_attention_and_encoder_read_the_weights_in_them(name, mode):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 8), layer).bfloat16().train(mode == "train")
    x = torch.randn(2, 5, 8).bfloat16()
    with torch.set_grad_enabled(mode != "no_grad"):
        expected = model(x)
        attached(model, f"1.{name}".removesuffix("."), targets=["0"])
        assert torch.equal(model(x), expected)
    classes = {type(module) for module in doratune.detach(model).modules()}
    assert all("computes_in" not in vars(module) for module in model.modules())
    assert nn.TransformerEncoderLayer in classes
    assert nn.MultiheadAttention in classes


def test_an_adapted_attention_with_a_whole_projection():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.MultiheadAttention(8, 2)]).bfloat16()
    x = torch.randn(5, 2, 8).bfloat16()
    expected = model[0](x, x, x)[0]
    attached(model, "out_proj", targets=["0"])
    assert torch.equal(model[0](x, x, x)[0], expected)
    copied = copy.deepcopy(model)
    doratune.merge(copied)
    torch.testing.assert_close(copied[0](x, x, x)[0], expected)
    doratune.unmerge(copied)
    doratune.detach(copied)
    assert torch.equal(copied[0](x, x, x)[0], expected)


def test_reading_the_weight_from_outside():
    """Asking for the dtype of a linear layer's weight is understood; a product with the weight is refused by PyTorch."""

    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.patches = nn.Linear(8, 8), nn.Linear(8, 4), nn.Conv1d(4, 4, 1)

        def forward(self, x):
            x = self.head(self.body(x).to(self.head.weight.dtype))
            return self.patches(x.to(self.patches.weight.dtype)[..., None])

    torch.manual_seed(0)
    model, x = Asks().bfloat16(), torch.randn(3, 8).bfloat16()
    expected = model(x)
    attached(model, "head", "patches", targets=["body"])
    assert torch.equal(model(x), expected)
    with pytest.raises(RuntimeError, match="dtype"):
        F.linear(x, model.head.weight)


def test_autocast_sees_the_input_as_it_is():
    model = net(nn.Linear(8, 4))
    x = torch.randn(64, 8)
    with torch.autocast("cpu", torch.float16):
        expected = model[1](x)
        attached(model, "1", targets=["0"])
        assert torch.equal(model[1](x), expected)


def test_verify_says_what_is_not_fp32():
    model = attached(tiny_llama(dtype=torch.bfloat16), "lm_head", "layers.1")
    assert doratune.verify(model, {"input_ids": IDS}).ok
    model.lm_head.weight.data = model.lm_head.weight.data.bfloat16()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    text = str(doratune.verify(model))
    assert "lm_head.weight is torch.bfloat16, which AdamW cannot move; it must be fp32" in text
    assert "model.layers.1.mlp.up_proj.weight holds NaN or infinite values" in text


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_cannot_cast_stays_and_is_reported():
    normed, patched = nn.utils.weight_norm(nn.LayerNorm(8)), nn.Linear(8, 8)
    model = net(normed, patched)
    patched.forward = lambda x: F.linear(x, patched.weight)
    x = torch.randn(2, 8).bfloat16()
    expected = model(x)
    attached(model, "1", "2", targets=["0"])
    assert torch.equal(model(x), expected)
    text = str(doratune.verify(model))
    assert "1.weight_g is torch.bfloat16, which AdamW cannot move" in text
    assert "2.weight is torch.bfloat16, which AdamW cannot move" in text


def test_parametrizations():
    class Doubled(nn.Module):
        def forward(self, w):
            return 2 * w

    model = net(nn.LayerNorm(8))
    nn.utils.parametrize.register_parametrization(model[1], "weight", Doubled())
    x = torch.randn(2, 8).bfloat16()
    expected = model(x)
    attached(model, "1", targets="0")
    assert all(p.dtype == torch.float32 for p in model[1].parameters())
    assert torch.equal(model(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    doratune.detach(model)
    assert torch.equal(model(x), expected)


def test_functional_calls():
    model = attached(net(nn.Linear(8, 4)), "1", targets=["0"])
    x, values = torch.randn(3, 8).bfloat16(), {k: p.detach() for k, p in model.named_parameters()}
    assert torch.equal(torch.func.functional_call(model, values, x), model(x))
    doubled = torch.func.functional_call(model, values | {"1.weight": 2 * values["1.weight"]}, x)
    assert not torch.equal(doubled, model(x))
    values = {k.removeprefix("1."): t for k, t in values.items() if k.startswith("1.")}
    gradient = torch.func.grad(lambda v: torch.func.functional_call(model[1], v, x).float().sum())(values)
    assert gradient["weight"].dtype == torch.float32
    replica = model[1]._replicate_for_data_parallel()  # of nn.DataParallel: parameters are plain attributes there
    replica.weight, replica.bias = values["weight"], values["bias"]
    assert torch.equal(replica(x), model[1](x))
    assert replica.weight.dtype == torch.float32


@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens", "norm"], ["layers.1"]])
def test_compiled_in_one_graph(names):
    torch._dynamo.reset()
    model = nudge(attached(tiny_llama(dtype=torch.bfloat16), *names))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for _ in range(3):
        got, expected = compiled(input_ids=IDS), model(input_ids=IDS)
        assert torch.equal(got.logits, expected.logits)
        got.logits.float().square().mean().backward()
        with torch.no_grad():
            for p in whole_of(model).values():
                p.sub_(p.grad)
        model.zero_grad()
    assert len(graphs) == 1
    assert all(isinstance(p, nn.Parameter) and p.dtype == torch.float32 for p in whole_of(model).values())


def test_a_part_of_an_attached_model_is_not_attached_again():
    model = attached(net(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))), "1.1", targets="0")
    with pytest.raises(UserError, match="has an adapter already"):
        doratune.attach(model[1], AdapterConfig(rank=2, targets=["0"]))
