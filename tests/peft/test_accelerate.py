"""doratune.peft.accelerate: PEFT's outputs and gradients over its layer types, and what PEFT itself gets wrong."""

import copy

import peft
import pytest
import storages
import torch
from accelerated import IDS, Around, differ, dora, error, moved, no_less_exact, pair, run, ways
from conftest import tiny_gpt2, tiny_llama
from torch import nn
from transformers.pytorch_utils import Conv1D

import doratune


def conv1d_of_transformers():
    layer = Conv1D(9, 12)
    nn.init.normal_(layer.weight)
    return layer


class ScaledEmbedding(nn.Embedding):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("embed_scale", torch.tensor(3.5))

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


LAYERS = {  # kind → (layer, the shape of one example)
    "Linear": (lambda: nn.Linear(12, 9), (4, 12)),
    "Linear without a bias": (lambda: nn.Linear(12, 9, bias=False), (12,)),
    "Linear, one output": (lambda: nn.Linear(12, 1), (12,)),
    "Conv1D of transformers": (conv1d_of_transformers, (4, 12)),
    "Conv1d": (lambda: nn.Conv1d(6, 7, 3, padding=1), (6, 8)),
    "Conv1d, stride": (lambda: nn.Conv1d(6, 7, 3, stride=2, bias=False), (6, 8)),
    "Conv2d": (lambda: nn.Conv2d(3, 8, 3, padding=1), (3, 4, 4)),
    "Conv2d, 1 x 1": (lambda: nn.Conv2d(3, 8, 1), (3, 4, 4)),
    "Conv2d, same": (lambda: nn.Conv2d(3, 8, (3, 1), padding="same"), (3, 4, 4)),
    "Conv3d": (lambda: nn.Conv3d(2, 4, (1, 2, 3)), (2, 2, 4, 3)),
    "Embedding": (lambda: nn.Embedding(20, 8, padding_idx=0), None),
    "Embedding, scaled": (lambda: ScaledEmbedding(20, 8), None),
}
CLOSE = {torch.float32: 4e-6, torch.float64: 1e-14}
"""Some tens of roundings; in a low precision PEFT's own error is the measure."""
DTYPES = [*CLOSE, torch.bfloat16, torch.float16]


def one(kind, dtype=torch.float32, **settings):
    """(PEFT's model, ours, an input)."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    theirs, ours = pair(Around(make(), shape).to(dtype), target_modules=["layer"], **settings)
    x = torch.arange(16).view(2, 8) if shape is None else torch.randn(6, *shape).to(dtype)
    return theirs, ours, x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_and_gradients_are_pefts(kind, dtype):
    theirs, ours, x = one(kind, dtype)
    for mode in (True, False):
        theirs.train(mode), ours.train(mode)
        if dtype.itemsize < 4:
            assert no_less_exact(theirs, ours, x)
        else:
            assert differ(theirs, ours, x) < CLOSE[dtype]
    assert ways(ours) == [2]


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_is_pefts(kind):
    theirs, ours, x = one(kind, lora_dropout=0.4)
    assert differ(theirs, ours, x) < 2e-6
    assert error(run(ours, x, seed=1)[0], run(ours, x, seed=2)[0]) > 1e-3 or "Embedding" in kind  # where PEFT drops nothing
    assert differ(theirs.eval(), ours.eval(), x) < 2e-6
    assert ways(ours) == [4]


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"rank_pattern": {"layer": 2}, "alpha_pattern": {"layer": 7}},
        {"bias": "lora_only"},
        {"bias": "all", "lora_dropout": 0.4},
        {"autocast_adapter_dtype": False},
    ],
    ids=lambda one: "-".join(one),
)
@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "Embedding"])
def test_settings_are_pefts(kind, settings):
    torch.manual_seed(0)
    own = {} if "autocast_adapter_dtype" not in settings else settings
    make, shape = LAYERS[kind]
    more = {} if own else settings
    config = peft.LoraConfig(r=3, target_modules=["layer"], use_dora=True, init_lora_weights=False, **more)
    dtype = torch.bfloat16 if own else torch.float32
    theirs = moved(peft.get_peft_model(Around(make(), shape).to(dtype), config, **own))
    ours = copy.deepcopy(theirs)
    doratune.peft.accelerate(ours)
    x = torch.arange(16).view(2, 8) if shape is None else torch.randn(6, *shape).to(dtype)
    assert no_less_exact(theirs, ours, x) if own else differ(theirs, ours, x) < CLOSE[dtype]
    assert ways(ours) == [1]


QUANTIZED = [
    *("nf4", "nf4, double", "fp4", "nf4, odd rows", "nf4, stored as bf16", "bitsandbytes int8"),
    *("HQQ 4 bit", "HQQ 8 bit", "HQQ 3 bit", "torchao int8", "torchao intx", "torchao float8"),
]


@pytest.mark.parametrize("storage", QUANTIZED)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_quantized_layers_are_pefts(storage, dropout):
    theirs, ours = (dora(quantized(storage), target_modules=["layer"], lora_dropout=dropout) for _ in range(2))
    x = torch.randn(7, ours.base_model.model.layer.in_features)
    expected = run(theirs, x)
    report = doratune.peft.accelerate(ours)
    assert len(report.layers) == 1 and not report.left
    for _ in range(2):  # PEFT's int8 layers fail on a CPU from their second call on
        got = run(ours, x)
        assert error(got[0], expected[0]) < 1e-5
        assert max(error(got[1][name], gradient) for name, gradient in expected[1].items()) < 1e-5
    assert ways(ours) == [2]


@pytest.mark.filterwarnings("ignore:(Unm|M)erge lora module to .-bit linear may get different generations")
@pytest.mark.parametrize("storage", ["nf4", "nf4, double", "HQQ 8 bit", "bitsandbytes int8"])
def test_quantized_layers_merge_and_unmerge_as_pefts(storage):
    theirs, ours = (dora(quantized(storage), target_modules=["layer"]) for _ in range(2))
    x = torch.randn(7, 64)
    doratune.peft.accelerate(ours)
    before = run(ours, x)[0]
    for model in (theirs, ours):
        model.merge_adapter()
    merged = run(ours, x)[0]
    assert torch.equal(merged, run(theirs, x)[0])
    assert error(merged, before) < 0.2  # quantized again
    for model in (theirs, ours):
        model.unmerge_adapter()
    assert error(run(ours, x)[0], run(theirs, x)[0]) < 1e-5
    assert ways(ours) == [1 if "HQQ" in storage else 2]  # PEFT merges into a new layer of HQQ's
    doratune.peft.restore(ours)
    if "int8" not in storage:
        assert error(run(ours, x)[0], run(theirs, x)[0]) == 0


def quantized(storage):
    """A model with one quantized layer, as PEFT wants to know it."""
    model = storages.build(storage, torch.float32).model
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = storage[:3] in ("nf4", "fp4"), "int8" in storage
    return model


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def test_whole_models(build):
    targets = "all-linear" if build is tiny_llama else ["c_attn", "c_proj", "c_fc", "wte"]
    theirs, ours = pair(build(), target_modules=targets)
    assert differ(theirs, ours, input_ids=IDS) < 1e-5
    assert set(ways(ours)) == {1}
    with torch.no_grad():
        a, b = (model.generate(input_ids=IDS[:1], max_new_tokens=8, do_sample=False) for model in (theirs, ours))
    assert a.tolist() == b.tolist()


def test_the_very_parameters_and_keys_stay():
    theirs = dora(tiny_llama(), target_modules="all-linear")
    before, keys = dict(theirs.named_parameters()), list(theirs.state_dict())
    report = doratune.peft.accelerate(theirs)
    assert len(report.layers) == 14 and "14 DoRA layers" in str(report)
    after = dict(theirs.named_parameters())
    assert list(after) == list(before) and all(after[name] is p for name, p in before.items())
    assert list(theirs.state_dict()) == keys
    assert [p.requires_grad for p in after.values()] == [p.requires_grad for p in before.values()]
    assert doratune.peft.accelerate(theirs) == report  # again: nothing new


def test_restore_gives_peft_back_bit_for_bit():
    theirs, ours = pair(tiny_llama(), target_modules="all-linear")
    classes = [type(module) for module in theirs.modules()]
    assert doratune.peft.restore(ours) is ours
    assert [type(module) for module in ours.modules()] == classes
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in ours.modules())
    assert differ(theirs, ours, input_ids=IDS) == 0
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(theirs.modules(), ours.modules(), strict=True))


# What PEFT itself gets wrong


@pytest.mark.parametrize("kind", ["Linear", "Conv1D of transformers", "Conv2d", "Embedding"])
def test_zero_rows_learn_like_lora_and_merge(kind):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    model = Around(make(), shape)
    with torch.no_grad():
        weight = model.layer.weight
        (weight[:, 3] if kind in ("Conv1D of transformers", "Embedding") else weight[3]).zero_()
    model = dora(model, r=3, target_modules=["layer"], init_lora_weights=True, bias="none")
    x = torch.arange(16).view(2, 8) if shape is None else torch.randn(6, *shape)
    assert not torch.isfinite(run(model, x)[0]).all()  # PEFT's 0/0
    doratune.peft.accelerate(model)
    assert torch.isfinite(run(model, x)[0]).all()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "embedding_A" in name:
                p.normal_(std=0.3)
    y, gradients = run(model, x)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    W, weight = model.base_model.model.layer.base_layer.weight, model.base_model.model.layer
    before, delta = W.detach().clone(), weight.get_delta_weight("default").detach()
    for safe in (False, True):
        weight.merge(safe_merge=safe)
        assert error(run(model, x)[0], y) < 1e-5  # merged, the same output
        along = 1 if kind in ("Conv1D of transformers", "Embedding") else 0
        assert torch.equal(W.select(along, 3), delta.select(along, 3))
        weight.unmerge()
        assert error(W, before) < 1e-5 and torch.isfinite(W).all()


def test_values_of_now_also_where_peft_remembers_a_norm():
    theirs, ours = pair(tiny_llama(), target_modules=["q_proj", "down_proj"])
    from peft.helpers import DoraCaching

    theirs.eval(), ours.eval()
    with DoraCaching(), torch.no_grad():
        for model in (theirs, ours):
            model(input_ids=IDS)
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.data = p.data * 2  # no version, no load
        stale, got = (model(input_ids=IDS).logits for model in (theirs, ours))
    expected = dora(tiny_llama(), target_modules=["q_proj", "down_proj"]).eval()
    for a, b in zip(expected.parameters(), ours.parameters(), strict=True):
        a.data.copy_(b.data)
    with torch.no_grad():
        assert error(got, expected(input_ids=IDS).logits) < 1e-5 < error(stale, expected(input_ids=IDS).logits)


def test_a_bf16_convolution_with_dropout_trains():
    """PEFT's convolves a float32 input with the bf16 weight."""
    theirs, ours, x = one("Conv2d", torch.bfloat16, lora_dropout=0.3)
    with pytest.raises(RuntimeError):
        run(theirs, x)
    y, gradients = run(ours, x)
    assert torch.isfinite(y).all() and len(gradients) == 3
    assert no_less_exact(theirs.eval(), ours.eval(), x)


# Training


def trained(model, steps=12, accumulation=2, **checkpointing):
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    model.train()
    losses = []
    for step in range(steps):
        for half in range(accumulation):
            ids = (IDS * (step + 3 * half + 1)) % 300
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("checkpointing", [{}, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_training_has_the_same_losses(checkpointing, dropout):
    theirs, ours = pair(tiny_llama(), target_modules="all-linear", lora_dropout=dropout)
    losses = []
    for model in (theirs, ours):
        torch.manual_seed(0)
        losses.append(trained(model, **checkpointing))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert min(losses[0]) < losses[0][0]
    for (name, p), own in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert error(own.detach(), p.detach()) < 2e-3, name


def test_autocast_is_pefts():
    theirs, ours = pair(tiny_llama(), target_modules="all-linear")
    with torch.autocast("cpu", torch.bfloat16):
        assert differ(theirs, ours, input_ids=IDS) < 0.15  # of two layers, in bf16
    assert differ(theirs, ours, input_ids=IDS) < 1e-5


def test_restored_in_the_middle_of_training():
    """The optimizer's state belongs to the same parameters."""
    theirs, ours = pair(tiny_llama(), target_modules=["q_proj", "up_proj"])
    curves = []
    for model in (theirs, ours):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        curve = []
        for step in range(9):
            if model is ours and step == 3:
                doratune.peft.restore(model)
            if model is ours and step == 6:
                doratune.peft.accelerate(model)
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


# What stays PEFT's, and what is refused


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


LEFT = {
    "groups": (lambda: nn.Conv2d(4, 8, 3, groups=2, padding=1), (4, 4, 4), {"r": 4}, "no groups"),
    "dilation": (lambda: nn.Conv2d(3, 8, 1, dilation=2), (3, 4, 4), {}, "no dilation"),
    "reflecting": (lambda: nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), (3, 4, 4), {}, "pads with zeros"),
    "a forward of its own": (lambda: Doubled(12, 9), (12,), {}, "the forward of Doubled is not x·Wᵀ + bias"),
    "max_norm": (lambda: nn.Embedding(20, 8, max_norm=1.0), None, {}, "max_norm"),
}


@pytest.mark.parametrize("name", LEFT)
def test_other_layers_stay_pefts_and_are_reported(name):
    torch.manual_seed(0)
    make, shape, settings, reason = LEFT[name]

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd, self.even = Around(make(), shape), Around(nn.Linear(8, 8), (8,))

        def forward(self, x):
            return self.even(torch.ones(2, 8)).sum() + self.odd(x)

    theirs = dora(Two(), target_modules=["layer"], **settings)
    ours = copy.deepcopy(theirs)
    report = doratune.peft.accelerate(ours)
    assert len(report.layers) == 1
    assert reason in report.left["base_model.model.odd.layer"] and reason in str(report)
    x = torch.arange(16).view(2, 8) if shape is None else torch.randn(6, *shape)
    assert differ(theirs, ours, x) < 2e-6
    with pytest.raises(doratune.UserError, match="no DoRA layer of this Around can be accelerated"):
        doratune.peft.accelerate(ours.base_model.model.odd)


REFUSED = {
    "a plain model": (tiny_llama, "this LlamaForCausalLM has no adapter of PEFT; .*use_dora=True"),
    "plain LoRA": (
        lambda: dora(tiny_llama(), use_dora=False, target_modules=["q_proj"]),
        r"are no DoRA \(Linear\); .*use_dora=True",
    ),
    "another method": (
        lambda: peft.get_peft_model(tiny_llama(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
        "are no DoRA",
    ),
    "our own": (
        lambda: doratune.attach(tiny_llama(), doratune.AdapterConfig(rank=2, targets=["q_proj"])),
        "has no adapter of PEFT",
    ),
    "no model": (lambda: "model", "expected a model with a DoRA adapter of PEFT, got str"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_accelerated_is_refused_in_one_line(name):
    make, message = REFUSED[name]
    with pytest.raises(doratune.UserError, match=message) as stop:
        doratune.peft.accelerate(make())
    assert "\n" not in str(stop.value)


def test_restore_of_what_is_not_accelerated():
    for model in (tiny_llama(), dora(tiny_llama(), target_modules=["q_proj"]), None):
        with pytest.raises(doratune.UserError, match=r"no layer of this .* is accelerated; pass the model"):
            doratune.peft.restore(model)


def test_attaching_over_it_is_refused():
    _, ours = pair(tiny_llama(), target_modules=["q_proj"])
    with pytest.raises(doratune.UserError, match="another package's adapter"):
        doratune.attach(ours)
