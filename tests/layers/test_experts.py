"""Batched experts: each is a linear DoRA layer, only routed ones cost anything, and the model's eager forward is the base."""

import copy
import io
import json

import pytest
import reference
import torch
from torch import nn

import doratune
from doratune.checkpoint.merge import merge_checkpoint
from doratune.errors import UserError

transformers = pytest.importorskip("transformers")

EXPERTS, TOKENS = 5, 40
PARTS = ("gate_up_proj", "down_proj")
SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 1, "head_dim": 8, "num_experts_per_tok": 2}


def mixtral():
    return transformers.MixtralConfig(**SMALL, num_local_experts=EXPERTS)


def qwen3_moe():
    return transformers.Qwen3MoeConfig(**SMALL, num_experts=EXPERTS, moe_intermediate_size=12)


def gpt_oss():
    return transformers.GptOssConfig(**SMALL, num_local_experts=EXPERTS)


FAMILIES = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss}


def build(family, implementation="eager"):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](), experts_implementation=implementation)
    for name, p in model.named_parameters():
        if "experts" in name:
            nn.init.normal_(p, std=0.2)
    return model


def experts_of(model):
    return model.model.layers[0].mlp.experts


def routing(seed=0, experts=EXPERTS, hidden=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, hidden, generator=generator).to(dtype)
    index = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(TOKENS)])
    return x, index, torch.rand(TOKENS, 2, generator=generator).to(dtype)


def config(axis="output", full=False, **more):
    settings = {"rank": 3, "alpha": 4.5, "targets": list(PARTS), "magnitude_axis": axis}
    return doratune.AdapterConfig(**settings | {"norm_gradient": "full" if full else "detached"} | more)


def move(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in doratune.adapters(model):
            for name, p in layer.named_parameters(recurse=False):
                noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                p.mul_(1 + 0.2 * noise.abs()) if name == "magnitude" else p.add_(0.1 * noise)


def single(family="mixtral", dtype=torch.float32, **settings):
    """(a holder of one experts module, adapted and moved away from its start, the layers by name)."""
    holder = nn.ModuleDict({"experts": experts_of(build(family))}).to(dtype)
    doratune.attach(holder, config(**settings))
    move(holder)
    return holder, {name.rpartition(".")[2]: layer for name, layer in doratune.adapters(holder)}


def dense(holder, layers, x, index, weights, axis, full, dtype, s, which=("lora_A", "lora_B", "magnitude")):
    """(y, {x and (part, parameter): gradient}) of a loop over experts with merged dense weights, written out."""
    owner = holder["experts"]
    leaves = {(part, name): layers[part]._parameters[name].detach().to(dtype).requires_grad_() for part in layers for name in which}
    x = x.to(dtype).requires_grad_()

    def weight(part, e):
        W = getattr(owner, part)[e].detach().double()
        W = (W.T if owner.is_transposed else W).to(dtype)
        own = [leaves[part, name][e] for name in which]
        A, B = own[:2] if len(own) > 1 else (None, None)
        return reference.merged(W, A, B, own[-1] if "magnitude" in which else None, s, axis, full)

    def bias(part, e):
        return getattr(owner, part + "_bias")[e].detach().to(dtype) if owner.has_bias else None

    y = torch.zeros_like(x)
    for e in range(len(owner.down_proj)):
        tokens, slot = (index == e).nonzero(as_tuple=True)
        if len(tokens):
            inner = owner._apply_gate(nn.functional.linear(x[tokens], weight("gate_up_proj", e), bias("gate_up_proj", e)))
            out = nn.functional.linear(inner, weight("down_proj", e), bias("down_proj", e))
            y = y.index_add(0, tokens, out * weights.to(dtype)[tokens, slot, None])
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape).to(dtype)).sum().backward()
    return y.detach(), {key: t.grad for key, t in leaves.items()} | {"x": x.grad}


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_a_loop_of_dora_layers(family, axis, full, dtype):
    holder, layers = single(family, dtype, axis=axis, full=full)
    x, index, weights = routing(dtype=dtype)
    leaf = x.clone().requires_grad_()
    y = holder["experts"](leaf, index, weights)
    assert y.dtype == dtype
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(dtype))
    s = layers["down_proj"].scaling
    exact_y, exact = dense(holder, layers, x, index, weights, axis, full, torch.float64, s)
    peer_y, peer = dense(holder, layers, x, index, weights, axis, full, dtype, s)
    floor = 2e-5 if dtype == torch.float32 else 2e-2
    assert relative(y, exact_y) <= max(floor / 4, 3 * relative(peer_y, exact_y))
    for key, gradient in exact.items():
        got = leaf.grad if key == "x" else layers[key[0]]._parameters[key[1]].grad
        assert relative(got, gradient) <= max(floor, 3 * relative(peer[key], gradient)), key
    with torch.no_grad():
        before = holder["experts"](x, index, weights)
        assert relative(before, exact_y) <= max(floor / 4, 3 * relative(peer_y, exact_y))
        W = holder["experts"].down_proj.clone()
        doratune.merge(holder)
        assert type(holder["experts"]).__name__ in ("MixtralExperts", "GptOssExperts")
        assert not any("adapter" in name for name in holder["experts"]._modules)
        assert relative(holder["experts"](x, index, weights), exact_y) <= max(floor, 3 * relative(peer_y, exact_y))
        doratune.unmerge(holder)
        assert torch.equal(holder["experts"].down_proj, W)
        assert torch.equal(holder["experts"](x, index, weights), before)


def test_only_routed_experts_cost_anything():
    holder, layers = single()
    x, index, weights = routing()
    index = index.clamp(max=1)
    index[:, 1] = 3
    optimizer = torch.optim.AdamW(doratune.parameter_groups(holder, lr=1e-3))
    for layer in layers.values():
        for part in layer.adapted.parts.values():
            part.preparations = part.calls = 0
    for step in range(1, 4):
        for _ in range(2):  # gradient accumulation: no new norm
            holder["experts"](x, index, weights).sum().backward()
        for layer in layers.values():
            counts = [layer.adapted.parts[e].preparations for e in range(EXPERTS)]
            assert counts == [step, step, 0, step, 0]
            assert [layer.adapted.parts[e].calls for e in range(EXPERTS)] == [2 * step, 2 * step, 0, 2 * step, 0]
        optimizer.step()
    assert layers["down_proj"].lora_B.grad[2].abs().sum() == 0


def test_gradient_memory_is_one_tensor_for_all_experts():
    """Slicing per expert would give autograd a gradient of the size of all experts for each."""
    holder, layers = single()
    y = holder["experts"](*routing())
    seen, nodes = set(), [y.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [after for after, _ in node.next_functions]
    names = [type(node).__name__ for node in seen]
    assert names.count("UnbindBackward0") == 6 and "SelectBackward0" not in names


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_models(family, tmp_path):
    model, ids = build(family), torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(3))
    base = model(ids).logits
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    doratune.attach(model, doratune.AdapterConfig(rank=3, alpha=6, targets="all-layers"))
    names = [name for name, _ in doratune.adapters(model)]
    assert [n for n in names if "experts" in n] == [f"model.layers.{i}.mlp.experts.{part}" for i in (0, 1) for part in PARTS]
    assert torch.equal(model(ids).logits, base)
    assert doratune.verify(model, ids).problems == []
    layer = dict(doratune.adapters(model))[names[4]]
    shape = layer.adapted.base.shape(layer)
    assert layer.lora_A.shape == (EXPERTS, 3, shape[2]) and layer.lora_B.shape == (EXPERTS, shape[1], 3)
    assert layer.magnitude.shape == (EXPERTS, shape[1])
    assert not any(torch.equal(layer.lora_A[0], layer.lora_A[e]) for e in range(1, EXPERTS))
    optimizer = torch.optim.AdamW(doratune.parameter_groups(model, lr=1e-2))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    trained = model(ids).logits
    assert not torch.equal(trained, base)
    state = copy.deepcopy(model.state_dict())
    doratune.save(model, tmp_path / "a")
    copied = copy.deepcopy(model)
    doratune.merge(model)
    assert relative(model(ids).logits, trained) < 1e-5
    doratune.save(model, tmp_path / "b")
    doratune.unmerge(model)
    assert torch.equal(model(ids).logits, trained)
    doratune.detach(model)
    assert torch.equal(model(ids).logits, base)
    assert {name: t.shape for name, t in model.state_dict().items()} == {name: t.shape for name, t in weights.items()}
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    assert torch.equal(copied(ids).logits, trained)  # a copy is a model of its own
    doratune.detach(copied)
    assert torch.equal(copied(ids).logits, base)
    for folder in ("a", "b"):
        doratune.load(model, tmp_path / folder)
        assert torch.equal(model(ids).logits, trained)
        doratune.detach(model)
    doratune.attach(model, doratune.AdapterConfig(rank=3, alpha=6, targets="all-layers", seed=4))
    model.load_state_dict(state)
    assert torch.equal(model(ids).logits, trained)
    with pytest.raises(UserError, match="PEFT writes otherwise"):
        doratune.save(model, tmp_path / "c", format="peft")


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_other_implementations_of_the_base_become_eager(implementation):
    model, ids = build("mixtral", implementation), torch.arange(18).view(2, 9)
    base = model(ids).logits
    doratune.attach(model, config())
    assert relative(model(ids).logits, base) < 1e-5


METHODS = [{"method": m} for m in ("lora", "vera", "dvora", "loha", "dloha", "lokr", "dlokr")]
METHODS += [{"start": "pissa"}, {"start": "olora"}, {"magnitude_form": "relative"}, {"dropout": 0.5}]
METHODS += [{"targets": [], "magnitude_only": list(PARTS)}]


@pytest.mark.parametrize("settings", METHODS, ids=str)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_every_direction(settings, family, tmp_path):
    """The start is exact, every trained tensor gets a gradient, merged = unmerged, and a folder gives it back."""
    model, ids = build(family), torch.arange(18).view(2, 9)
    base = model(ids).logits
    doratune.attach(model, config(**settings))
    assert torch.equal(model.eval()(ids).logits, base)
    move(model)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    for name, layer in doratune.adapters(model):
        for key, p in layer.named_parameters(recurse=False):
            assert not p.requires_grad or (torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0), (name, key)
    y = model.eval()(ids).logits
    with torch.no_grad():
        assert relative(model(ids).logits, y) < 1e-5
    doratune.save(model, tmp_path / "a")
    doratune.merge(model)
    assert relative(model(ids).logits, y) < 1e-4
    doratune.unmerge(model)
    doratune.detach(model)
    doratune.load(model, tmp_path / "a")
    assert relative(model(ids).logits, y) < 1e-6


@pytest.mark.parametrize("axis", ["output", "input"])
def test_rows_without_direction_stay_plain(axis):
    holder = nn.ModuleDict({"experts": experts_of(build("mixtral"))})
    with torch.no_grad():
        W = holder["experts"].down_proj[1]
        (W if axis == "output" else W.T)[2] = 0.0
    doratune.attach(holder, config(axis))
    move(holder)
    layer = dict(doratune.adapters(holder))["experts.down_proj"]
    x, index, weights = routing()
    y = holder["experts"](x, index, weights)
    y.sum().backward()
    assert layer.magnitude.grad[1, 2] == 0 and torch.isfinite(layer.lora_B.grad).all()
    with torch.no_grad():
        layer.magnitude[1, 2] = 7.0
        assert torch.equal(holder["experts"](x, index, weights), y)
    assert layer.adapted.facts.directionless.nonzero().tolist() == [[1, 2]]
    assert doratune.verify(holder).zero_rows == {"experts.down_proj": 1}


def test_adapter_stays_wide_and_m_follows_the_weight():
    model, ids = build("mixtral"), torch.arange(18).view(2, 9)
    doratune.attach(model, config())
    model.to(torch.bfloat16)
    low = copy.deepcopy(model)
    assert all(p.dtype == torch.float32 for _, layer in doratune.adapters(model) for p in layer.parameters())
    doratune.detach(low)
    assert torch.equal(model(ids).logits, low(ids).logits)
    move(model)
    y = model(ids).logits
    doratune.merge(model)
    model.float()
    doratune.unmerge(model)
    assert experts_of(model).gate_up_proj.dtype == torch.float32
    assert relative(model(ids).logits, y) < 2e-2
    model.double()
    assert all(p.dtype == torch.float64 for _, layer in doratune.adapters(model) for p in layer.parameters())


def test_pickled_and_one_weight_alone():
    model, ids = build("mixtral"), torch.arange(18).view(2, 9)
    doratune.attach(model, config(targets=["layers.1.mlp.experts.down_proj"]))
    move(model)
    assert [name for name, _ in doratune.adapters(model)] == ["model.layers.1.mlp.experts.down_proj"]
    assert type(experts_of(model)).__name__ == "MixtralExperts"
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(ids).logits, model(ids).logits)


def test_gradient_checkpointing_and_compile():
    model, ids = build("mixtral"), torch.arange(18).view(2, 9)
    doratune.attach(model, config())
    move(model)
    grads = []
    for checkpointing in (False, True):
        model.gradient_checkpointing_enable() if checkpointing else None
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    holder, _ = single()
    x = routing()
    compiled = torch.compile(holder["experts"], backend="eager")
    assert torch.equal(compiled(*x), holder["experts"](*x))


def test_selection():
    model = build("mixtral")
    report = doratune.attach(model, doratune.AdapterConfig(rank=2))
    left_out = doratune.verify(report).left_out
    assert left_out["model.layers.0.mlp.experts"] == "expert weights; name them, or use all-layers"
    doratune.detach(model)
    doratune.attach(model, doratune.AdapterConfig(rank=2, targets=["experts"], exclude=["layers.0.mlp.experts"]))
    assert [name for name, _ in doratune.adapters(model)] == [f"model.layers.1.mlp.experts.{part}" for part in PARTS]
    doratune.detach(model)
    doratune.attach(model, config(targets=["experts"], rank_overrides={"down_proj": 2}))
    assert [layer.adapted.rank for _, layer in doratune.adapters(model)] == [3, 2, 3, 2]


def test_names_of_peft_select_no_experts(tmp_path):
    """PEFT's target_modules are modules; a list that happens to name `down_proj` does not ask for batched weights."""
    model = build("mixtral")
    doratune.attach(model, config(targets=["q_proj"]))
    doratune.save(model, tmp_path / "a", format="peft")
    doratune.detach(model)
    (tmp_path / "a" / "doratune.json").unlink()
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["q_proj", "down_proj"]}))
    doratune.load(model, tmp_path / "a")
    assert {name.rpartition(".")[2] for name, _ in doratune.adapters(model)} == {"q_proj"}


def test_a_folder_is_merged_in_memory_only(tmp_path):
    """Checkpoints name expert weights in their own ways."""
    model = build("mixtral")
    model.save_pretrained(tmp_path / "base")
    doratune.attach(model, config())
    doratune.save(model, tmp_path / "a")
    with pytest.raises(UserError, match="save_pretrained instead"):
        merge_checkpoint(str(tmp_path / "base"), tmp_path / "a", tmp_path / "out")
    doratune.detach(model)
    model.save_pretrained(tmp_path / "detached")  # loads as the base
    loaded = type(model).from_pretrained(tmp_path / "detached", experts_implementation="eager")
    assert torch.equal(loaded(torch.arange(6)[None]).logits, model(torch.arange(6)[None]).logits)


class BiasedExperts(nn.Module):
    """A class that hands its bias to the product."""

    def __init__(self):
        super().__init__()
        self.has_gate, self.has_bias, self.is_transposed, self.num_experts = True, True, False, 3
        self.act_fn = torch.tanh
        for name, rows, columns in (("gate_up_proj", 8, 6), ("down_proj", 6, 4)):
            self.register_parameter(name, nn.Parameter(torch.randn(3, rows, columns)))
            self.register_parameter(name + "_bias", nn.Parameter(5 * torch.randn(3, rows)))

    def _apply_gate(self, x):
        gate, up = x.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, x, index, weights):
        y = torch.zeros_like(x)
        for e in index.unique():
            tokens, slot = (index == e).nonzero(as_tuple=True)
            inner = self._apply_gate(nn.functional.linear(x[tokens], self.gate_up_proj[e], self.gate_up_proj_bias[e]))
            out = nn.functional.linear(inner, self.down_proj[e], bias=self.down_proj_bias[e])
            y.index_add_(0, tokens, out * weights[tokens, slot, None])
        return y


def test_the_bias_is_not_scaled():
    torch.manual_seed(0)
    holder = nn.ModuleDict({"experts": BiasedExperts()})
    doratune.attach(holder, config())
    move(holder)
    layers = {name.rpartition(".")[2]: layer for name, layer in doratune.adapters(holder)}
    x, index, weights = routing(experts=3, hidden=6)
    exact, _ = dense(holder, layers, x, index, weights, "output", False, torch.float64, layers["down_proj"].scaling)
    assert relative(holder["experts"](x, index, weights), exact) < 1e-6
    with torch.no_grad():
        assert relative(holder["experts"](x, index, weights), exact) < 1e-6


def test_refresh_reaches_every_expert():
    """A hand edit that nothing else would notice: `.data`, no gradients, few tokens."""
    holder, layers = single()
    x, index, weights = routing()
    with torch.no_grad():
        y = holder["experts"](x[:2], index[:2], weights[:2])
        layers["down_proj"].lora_B.data.mul_(2.0)
        doratune.refresh(holder)
        assert not torch.equal(holder["experts"](x[:2], index[:2], weights[:2]), y)
        doratune.merge(holder)
        merged = holder["experts"](x[:2], index[:2], weights[:2])
        doratune.unmerge(holder)
        assert relative(holder["experts"](x[:2], index[:2], weights[:2]), merged) < 1e-5


class UnknownExperts(nn.Module):
    def __init__(self, facts=()):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(3, 8, 4)), nn.Parameter(torch.randn(3, 4, 4))
        vars(self).update(facts)
        self.act_fn = torch.tanh

    def forward(self, x, index, weights):
        return torch.bmm(x.expand(3, -1, -1), self.gate_up_proj.mT).sum(0)[:, :4]


FACTS = {"has_gate": True, "has_bias": False, "is_transposed": False, "num_experts": 3}


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({}, "UnknownExperts is an expert layout that is not known"),
        (FACTS, "the forward of UnknownExperts is not a loop of products"),
        (FACTS | {"has_gate": False}, "an expert layout that is not known"),
        (FACTS | {"is_transposed": True}, "the shapes of its projections do not fit"),
    ],
)
def test_unknown_layouts_are_refused(facts, message):
    model = nn.ModuleDict({"experts": UnknownExperts(facts), "head": nn.Linear(4, 4)})
    with pytest.raises(UserError, match=message):
        doratune.attach(model, doratune.AdapterConfig(rank=2, targets=["experts"]))
    doratune.attach(model, doratune.AdapterConfig(rank=2, targets="all-layers"))
    assert [name for name, _ in doratune.adapters(model)] == ["head"]
    assert any(message in reason for reason in doratune.verify(model).left_out.values())


def test_starts_of_quantized_weights_are_refused():
    with pytest.raises(UserError, match="quantized weights"):
        doratune.attach(build("mixtral"), config(start="loftq"))
