"""nn.MultiheadAttention: the adapted module against its base bit for bit, merged weights, and three linear layers."""

import copy
import io

import pytest
import reference
import torch
from torch import nn
from torch.nn import functional as F

import doratune
from doratune.errors import UserError

E, HEADS, N, L, S = 12, 2, 3, 5, 7


def attention(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(E, HEADS, **settings).to(dtype)
    for name, p in module.named_parameters():
        if "bias" in name:
            nn.init.normal_(p, std=0.3)
    return nn.ModuleDict({"attn": module.requires_grad_(False)})  # PyTorch multiplies with a frozen weight in another order


def attach(model, axis="output", full=False, **more):
    settings = {
        "rank": 3,
        "alpha": 4.5,
        "targets": ["attn"],
        "magnitude_axis": axis,
        "norm_gradient": "full" if full else "detached",
    }
    return doratune.attach(model, doratune.AdapterConfig(**settings | more))


def move(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    own = {}
    with torch.no_grad():
        for layer_name, layer in doratune.adapters(model):
            for name, p in layer.named_parameters(recurse=False):
                if p.requires_grad:
                    noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                    p.mul_(1 + 0.2 * noise.abs()) if name == "magnitude" else p.add_(0.2 * noise)
                    own[layer_name.rpartition(".")[2], name] = p
    return own


def inputs(kind, batch_first=False, dtype=torch.float32, seed=2):
    """(query, key, value), the same objects where the base looks whether they are."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length):
        if kind.startswith("unbatched"):
            return torch.randn(length, E, generator=generator).to(dtype)
        return torch.randn((N, length, E) if batch_first else (length, N, E), generator=generator).to(dtype)

    q, k = draw(L), draw(S)
    return {"self": (q, q, q), "cross": (q, k, k), "all": (q, k, draw(S))}[kind.split()[-1]]


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def masks(kind, sources, dtype):
    """Keyword arguments with masks of one kind."""
    padding = torch.zeros(N, sources, dtype=torch.bool)
    padding[1, -2:] = True
    causal = torch.triu(torch.ones(L, sources, dtype=torch.bool), 1)
    each = torch.zeros(N * HEADS, L, sources, dtype=dtype).masked_fill(torch.rand(N * HEADS, L, sources) < 0.2, -2.0)
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "mask": {"attn_mask": causal},
        "both": {"attn_mask": causal, "key_padding_mask": padding},
        "per head": {"attn_mask": each},
        "causal": {"attn_mask": causal, "is_causal": True},
        "causal and padding": {"attn_mask": causal, "key_padding_mask": padding, "is_causal": True},
    }[kind]


def same(a, b):
    return torch.equal(a[0], b[0]) and (a[1] is None) == (b[1] is None) and (a[1] is None or torch.equal(a[1], b[1]))


@pytest.mark.parametrize("kind", ["self", "cross", "all"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mask", ["none", "padding", "mask", "both", "per head", "causal", "causal and padding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_start_is_exact(kind, batch_first, mask, dtype):
    model = attention(dtype, batch_first=batch_first)
    qkv = inputs(kind, batch_first, dtype)
    more = masks(mask, L if kind == "self" else S, dtype)
    calls = [{"need_weights": False}, {"need_weights": True}, {"average_attn_weights": False}]
    before = [model["attn"](*qkv, **more, **call) for call in calls]
    attach(model)
    assert [name for name, _ in doratune.adapters(model)] == ["attn", "attn.out_proj"]
    assert all(same(model["attn"](*qkv, **more, **call), y) for call, y in zip(calls, before, strict=True))
    assert doratune.verify(model).problems == []
    doratune.detach(model)
    assert all(same(model["attn"](*qkv, **more, **call), y) for call, y in zip(calls, before, strict=True))


@pytest.mark.parametrize("kind", ["unbatched self", "unbatched cross"])
@pytest.mark.parametrize("settings", [{"bias": False}, {"dropout": 0.4}, {"batch_first": True}])
def test_start_is_exact_unbatched_with_dropout_without_bias(kind, settings):
    model, qkv = attention(**settings), inputs(kind)
    padding = torch.arange(len(qkv[1])) > 4

    def run(**more):
        torch.manual_seed(5)
        return model["attn"](*qkv, key_padding_mask=padding, **more)

    before = run(), run(need_weights=False)
    attach(model)
    assert same(run(), before[0]) and same(run(need_weights=False), before[1])


def merged_run(model, own, qkv, axis, full, dtype, dY):
    """(y, gradients) with dense merged weights through PyTorch's own function."""
    module = model["attn"]
    leaves = {key: p.detach().to(dtype).requires_grad_() for key, p in own.items()}
    x = {id(t): t.detach().to(dtype).requires_grad_() for t in qkv}

    def weight(layer, W):
        W = W.detach().to(dtype)
        return reference.merged(W, *(leaves[layer, n] for n in ("lora_A", "lora_B", "magnitude")), module.scaling, axis, full)

    bias, out_bias = (b.detach().to(dtype) for b in (module.in_proj_bias, module.out_proj.bias))
    packed, out = weight("attn", module.in_proj_weight), weight("out_proj", module.out_proj.weight)
    x_qkv = [x[id(t)] for t in qkv]
    y, _ = F.multi_head_attention_forward(*x_qkv, E, HEADS, packed, bias, None, None, False, 0.0, out, out_bias, need_weights=False)
    y.backward(dY.to(dtype))
    return y.detach(), {key: t.grad for key, t in leaves.items()} | {i: t.grad for i, t in x.items()}


@pytest.mark.parametrize("kind", ["self", "cross", "all"])
@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_gradients_and_merge(kind, axis, full, dtype):
    model = attach(attention(dtype), axis, full)
    own, qkv = move(model), inputs(kind, dtype=dtype)
    leaves = {id(t): t.clone().requires_grad_() for t in qkv}
    y, _ = model["attn"](*(leaves[id(t)] for t in qkv), need_weights=False)
    dY = torch.linspace(-1, 1, y.numel()).view(y.shape).to(dtype)
    y.backward(dY)
    exact_y, exact = merged_run(model, own, qkv, axis, full, torch.float64, dY)
    peer_y, peer = merged_run(model, own, qkv, axis, full, dtype, dY)
    floor = 2e-5 if dtype == torch.float32 else 2e-2
    assert relative(y, exact_y) <= max(floor / 4, 3 * relative(peer_y, exact_y))
    for key, gradient in exact.items():
        got = leaves[key].grad if key in leaves else own[key].grad
        assert relative(got, gradient) <= max(floor, 3 * relative(peer[key], gradient)), key
    with torch.no_grad():
        assert relative(model["attn"](*qkv, need_weights=False)[0], exact_y) <= max(floor / 4, 3 * relative(peer_y, exact_y))
        W = model["attn"].in_proj_weight.clone()
        doratune.merge(model)
        assert type(model["attn"]) is nn.MultiheadAttention
        assert relative(model["attn"](*qkv, need_weights=False)[0], exact_y) <= max(floor, 3 * relative(peer_y, exact_y))
        doratune.unmerge(model)
        assert torch.equal(model["attn"].in_proj_weight, W)


@pytest.mark.parametrize("kind", ["self", "cross", "all"])
@pytest.mark.parametrize("full", [False, True])
def test_equals_its_unpacked_form(kind, full):
    """Three linear DoRA layers over the rows of q, k and v, and one for the output."""
    model = attach(attention(torch.float64), full=full)
    own, qkv = move(model), inputs(kind, dtype=torch.float64)
    y, weights = model["attn"](*qkv)
    (y.square().sum() + weights.square().sum()).backward()
    parts = nn.ModuleDict({name: nn.Linear(E, E).double() for name in ("q", "k", "v", "out_proj")})
    packed, sources = model["attn"], {}
    with torch.no_grad():
        for i, name in enumerate("qkv"):
            rows = slice(i * E, (i + 1) * E)
            parts[name].weight.copy_(packed.in_proj_weight[rows]), parts[name].bias.copy_(packed.in_proj_bias[rows])
            sources[name] = {"lora_A": packed.lora_A, "lora_B": packed.lora_B[rows], "magnitude": packed.magnitude[rows]}
        parts["out_proj"].weight.copy_(packed.out_proj.weight), parts["out_proj"].bias.copy_(packed.out_proj.bias)
        sources["out_proj"] = {n: own["out_proj", n] for n in ("lora_A", "lora_B", "magnitude")}
        attach(parts, full=full, targets=["q", "k", "v", "out_proj"])
        for name, values in sources.items():
            for key, value in values.items():
                parts[name]._parameters[key].copy_(value)
    q, k, v = (parts[n](x).unflatten(-1, (HEADS, -1)).movedim(0, -2) for n, x in zip("qkv", qkv, strict=True))
    scores = (q @ k.mT / (E // HEADS) ** 0.5).softmax(-1)
    expected = parts["out_proj"]((scores @ v).movedim(-2, 0).flatten(-2))
    (expected.square().sum() + scores.mean(1).square().sum()).backward()
    assert relative(y, expected) < 1e-12 and relative(weights, scores.mean(1)) < 1e-12
    assert relative(packed.lora_A.grad, sum(parts[n].lora_A.grad for n in "qkv")) < 1e-10
    for name in ("lora_B", "magnitude"):
        assert relative(packed._parameters[name].grad, torch.cat([parts[n]._parameters[name].grad for n in "qkv"])) < 1e-10
        assert relative(own["out_proj", name].grad, parts["out_proj"]._parameters[name].grad) < 1e-10


METHODS = [{"method": m} for m in ("lora", "vera", "dvora", "loha", "dloha", "lokr", "dlokr")]
METHODS += [{"start": "pissa"}, {"magnitude_form": "relative"}, {"dropout": 0.5}, {"targets": [], "magnitude_only": ["attn"]}]


@pytest.mark.parametrize("settings", METHODS, ids=str)
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_every_direction(settings, kind, tmp_path):
    model, qkv = attention(), inputs(kind)
    before = model["attn"](*qkv)
    attach(model, **settings)
    assert same(model.eval()["attn"](*qkv), before)
    own = move(model)
    model.train()["attn"](*qkv)[0].square().sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in own.values())
    y = model.eval()["attn"](*qkv)[0]
    doratune.save(model, tmp_path / "a")
    doratune.merge(model)
    assert relative(model["attn"](*qkv)[0], y) < 1e-5
    doratune.unmerge(model)
    assert torch.equal(model["attn"](*qkv)[0], y)
    doratune.detach(model)
    doratune.load(model, tmp_path / "a")
    assert relative(model["attn"](*qkv)[0], y) < 1e-6


def encoder(**settings):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, HEADS, 16, batch_first=True, dropout=0.0, **settings)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize("targets", ["all-layers", "all-linear", ["layers.1.self_attn"], ["layers.1.linear1"]])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_fast_paths_do_not_bypass_the_adapter(targets, gradients):
    """In evaluation, with padding (nested tensors) and without: the trained adapter counts, and detach opens the paths again."""
    model, x = encoder(), torch.randn(N, L, E)
    padding = torch.arange(L) >= torch.tensor([[L], [3], [2]])
    states = [(training, more) for training in (True, False) for more in ({}, {"src_key_padding_mask": padding})]

    def run():
        with torch.set_grad_enabled(gradients):
            return [model.train(training)(x, **more) for training, more in states]

    def agree(ys, zs, tolerance):
        for (_, more), y, z in zip(states, ys, zs, strict=True):
            shown = ~more.get("src_key_padding_mask", torch.zeros_like(padding))  # nested tensors have zeros where padded
            assert relative(y[shown], z[shown]) <= tolerance

    base = run()
    attach(model, targets=targets)
    agree(run(), base, 1e-5)
    assert doratune.verify(model, {"src": x, "src_key_padding_mask": padding}).problems == []
    move(model)
    y = run()
    assert relative(y[0], base[0]) > 1e-2
    assert relative(y[2], y[0]) < 1e-5 and relative(y[3][~padding], y[1][~padding]) < 1e-5
    copied = copy.deepcopy(model)
    doratune.merge(model)
    assert model.use_nested_tensor
    agree(run(), y, 1e-5)
    doratune.unmerge(model)
    agree(run(), y, 1e-6)
    for one in (model, copied):
        doratune.detach(one)
        assert one.use_nested_tensor and not any(m._forward_pre_hooks for m in one.modules())
    assert all(torch.equal(a, b) for a, b in zip(run(), base, strict=True))


def test_decoder_pickle_low_precision_and_norms():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(E, HEADS, 16, dropout=0.0)
    x, memory = torch.randn(L, N, E), torch.randn(S, N, E)
    before = layer(x, memory)
    attach(layer, targets="all-layers")
    names = [name for name, _ in doratune.adapters(layer)]
    assert names == [f"{a}{b}" for a in ("self_attn", "multihead_attn") for b in ("", ".out_proj")] + ["linear1", "linear2"]
    assert torch.equal(layer(x, memory), before)
    optimizer = torch.optim.AdamW(doratune.parameter_groups(layer, lr=1e-2))
    counted = layer.self_attn.adapted, layer.multihead_attn.adapted
    for weight in counted:
        weight.preparations = 0
    for _ in range(3):
        layer(x, memory).square().sum().backward()
        layer(x, memory).square().sum().backward()
        optimizer.step()
    assert [weight.preparations for weight in counted] == [2, 2]
    y = layer(x, memory)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x, memory), y)
    layer.bfloat16()
    assert layer.self_attn.lora_A.dtype == layer.self_attn.magnitude.dtype == torch.float32
    assert relative(layer(x.bfloat16(), memory.bfloat16()), y) < 3e-2


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled():
    model = attach(attention())
    move(model)
    qkv = inputs("self")
    compiled = torch.compile(model["attn"], backend="eager", fullgraph=True)
    assert relative(compiled(*qkv)[0], model["attn"](*qkv)[0]) < 1e-6
    qkv = inputs("cross")
    assert relative(torch.compile(model["attn"], backend="eager")(*qkv)[0], model["attn"](*qkv)[0]) < 1e-6


def test_rows_without_direction_stay_plain():
    model = attention()
    with torch.no_grad():
        model["attn"].in_proj_weight[E + 2] = 0.0
    attach(model)
    own = move(model)
    for kind in ("self", "cross", "all"):
        qkv = inputs(kind)
        y = model["attn"](*qkv)[0]
        y.sum().backward()
        assert own["attn", "magnitude"].grad[E + 2] == 0 and torch.isfinite(own["attn", "lora_B"].grad).all()
        with torch.no_grad():
            own["attn", "magnitude"][E + 2] = 7.0
        assert torch.equal(model["attn"](*qkv)[0], y)


def test_which_rows_have_a_direction_is_decided_in_the_whole():
    """Rows of q that are small beside k and v, but not beside each other: the same rows in self- and in cross-attention."""
    model = attention()
    with torch.no_grad():
        model["attn"].in_proj_weight[:E] *= 1e-8
    own = move(attach(model))
    with torch.no_grad():
        own["attn", "magnitude"][:E] = 3.0
    q = inputs("self")[0]
    y = model["attn"](q, q, q)[0]
    assert relative(model["attn"](q, q.clone(), q.clone())[0], y) < 1e-6
    layer = model["attn"]
    assert layer.adapted.facts.directionless.nonzero().flatten().tolist() == list(range(E))


class OwnForward(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.MultiheadAttention(E, HEADS, kdim=8), "separate weights"),
        (nn.MultiheadAttention(E, HEADS, vdim=8), "separate weights"),
        (nn.MultiheadAttention(E, HEADS, add_bias_kv=True), "add_bias_kv"),
        (nn.MultiheadAttention(E, HEADS, add_zero_attn=True), "add_zero_attn"),
        (OwnForward(E, HEADS), "OwnForward has a forward of its own"),
    ],
)
def test_refusals(module, message):
    model = nn.ModuleDict({"attn": module, "head": nn.Linear(E, E)})
    with pytest.raises(UserError, match=message):
        attach(model)
    attach(model, targets="all-layers")
    assert [name for name, _ in doratune.adapters(model)] == ["head"]
    left_out = doratune.verify(model).left_out
    assert message in left_out["attn"] and "MultiheadAttention" in left_out["attn.out_proj"]


def test_selection(tmp_path):
    model = attention()
    with pytest.raises(UserError, match="adapt attn itself"):
        attach(model, targets=["out_proj"])
    attach(model, exclude=["out_proj"], rank_overrides={"attn": 2})
    assert [(name, layer.adapted.rank) for name, layer in doratune.adapters(model)] == [("attn", 2)]
    with pytest.raises(UserError, match="PEFT writes otherwise"):
        doratune.save(model, tmp_path / "a", format="peft")
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(E, HEADS), "head": nn.Linear(64, 64)})
    attach(model, targets="all-layers", rank=4, rank_overrides={"attn": 13})
    assert [name for name, _ in doratune.adapters(model)] == ["head"]
    assert "bypassed" in doratune.verify(model).left_out["attn.out_proj"]
