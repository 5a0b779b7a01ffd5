"""What the op reads and keeps: m's gradient from y or from the base, the plain linear path, shared norms, ready factors."""

import copy
import pickle

import pytest
import reference
import torch
from conftest import one_layer, randomize, tiny_llama
from torch import nn
from torch.utils.checkpoint import checkpoint

import doratune
from doratune.layers import prepared


class OpaqueLinear(nn.Linear):
    """A subclass with a forward of its own: the op cannot take over its product."""

    def forward(self, input):
        return nn.functional.linear(input, self.weight, self.bias)


def opaque_layer(**config):
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("layer", OpaqueLinear(10, 13))
    doratune.attach(model, doratune.AdapterConfig(**{"rank": 3, "alpha": 5.0, "targets": ["layer"]} | config))
    return model, model.layer


KINDS = {"plain": one_layer, "opaque": opaque_layer}


def exact(layer, x, dY, full=False):
    t = {k: getattr(layer, n) for k, n in (("A", "lora_A"), ("B", "lora_B"), ("m", "magnitude"))}
    t = {k: None if v is None else v.detach().double() for k, v in t.items()}
    W, bias = layer.weight.detach().double(), layer.bias.detach().double()
    return reference.gradients(x.double(), dY.double(), W, bias, t["A"], t["B"], t["m"], layer.scaling, full=full)[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["detached", "full"])
@pytest.mark.parametrize("dropout", [0.0, 1e-9])
def test_gradient_of_tiny_and_zero_magnitudes(kind, mode, dropout):
    """At |g| < 1e-2 y has lost the base's digits behind the bias, at m = 0 all of them: those rows come from W again."""
    model, layer = KINDS[kind](norm_gradient=mode, dropout=dropout)
    randomize(model.train())
    with torch.no_grad():
        layer.bias.mul_(1000)
        layer.magnitude[2], layer.magnitude[5], layer.magnitude[7] = 0.0, 1e-6, -1e-3
    x, dY = torch.randn(9, 10), torch.randn(9, 13)
    leaf = x.clone().requires_grad_()
    layer(leaf).backward(dY)
    want = exact(layer, x, dY, full=mode == "full")
    for name, got in (("m", layer.magnitude.grad), ("A", layer.lora_A.grad), ("B", layer.lora_B.grad), ("x", leaf.grad)):
        rows = [2, 5, 7] if name == "m" else slice(None)
        torch.testing.assert_close(got[rows].double(), want[name][rows], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("how", ["eager", "checkpoint", "reentrant checkpoint"])
def test_output_changed_in_place(kind, dropout, how):
    """relu_ after the layer overwrites the y that m's gradient would be read from, also within a checkpoint."""
    grads = []
    for in_place in (True, False):
        model, layer = KINDS[kind](dropout=dropout)
        randomize(model.train())
        act = torch.relu_ if in_place else torch.relu
        x = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(5)).requires_grad_()
        torch.manual_seed(1)
        block = lambda x, layer=layer, act=act: act(layer(x)).square()  # noqa: E731
        y = block(x) if how == "eager" else checkpoint(block, x, use_reentrant=how.startswith("reentrant"))
        y.sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(grads[0]) == 4
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_kept_output_is_shared_with_a_later_operation(kind):
    """What a later product keeps is the very memory of y; nothing output-sized is kept besides."""
    model, layer = KINDS[kind](rank=2)
    randomize(model)
    sizes = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    gate = torch.randn(50, 13, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(torch.randn(50, 10, requires_grad=True)) * gate
    assert sorted(sizes.values()).count(4 * 50 * 13) == 2  # y and gate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_plain_and_opaque_layers_agree(dtype, method):
    torch.manual_seed(0)
    results = []
    for make in KINDS.values():
        model, layer = make(method=method)
        layer.to(dtype)
        randomize(model)
        x = torch.randn(20, 10, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        y = layer(x)
        y.float().square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    low = dtype == torch.bfloat16
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=2e-2 if low else 1e-5, atol=5e-2 if low else 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trainable_bias_gets_the_whole_gradient(kind):
    model, layer = KINDS[kind]()
    randomize(model)
    layer.bias.requires_grad_(True)
    dY = torch.randn(9, 13)
    layer(torch.randn(9, 10)).backward(dY)
    torch.testing.assert_close(layer.bias.grad, dY.sum(0))


def test_dropout_drops_inputs_of_the_branch_only():
    model, layer = one_layer(method="lora", dropout=0.5, bias=False)
    randomize(model.train())
    x = torch.ones(4000, 10)
    got = (layer(x) - nn.functional.linear(x, layer.weight)).mean(0)
    torch.testing.assert_close(got, (layer.scaling * x[:1] @ layer.lora_A.T @ layer.lora_B.T)[0].detach(), rtol=0.1, atol=0.05)
    assert layer(x).std(0).min() > 0.01


def stack_of_layers(count=4, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(12, 12, bias=False, dtype=dtype) for _ in range(count)), nn.Linear(12, 7, dtype=dtype))
    doratune.attach(model, doratune.AdapterConfig(rank=3, targets="all-linear"))
    return randomize(model, scale=0.05)


def step(model):
    optimizer = torch.optim.SGD(doratune.parameter_groups(model, lr=1e-3))
    model(torch.randn(70, 12)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_prepared_together_have_the_norm_that_they_would_have_alone(dtype, monkeypatch):
    model = stack_of_layers(dtype=dtype)
    model.append(nn.Identity())
    layers = [layer for _, layer in doratune.adapters(model)]
    asked = []
    inner = prepared.norm.stacked
    monkeypatch.setattr(prepared.norm, "stacked", lambda U, *a: asked.append(len(U)) or inner(U, *a))
    x = torch.randn(70, 12, dtype=dtype)
    model(x)
    assert asked == [1] * 5  # nobody was asked before the first call
    optimizer = torch.optim.SGD(doratune.parameter_groups(model, lr=1e-3))
    model(x).float().square().sum().backward()
    optimizer.step()
    asked.clear()
    model(x)
    assert asked == [4, 1]  # four layers of one shape together
    assert [layer.adapted.preparations for layer in layers] == [2] * 5
    for layer in layers:
        n = layer.adapted.n(dtype)
        alone = layer.adapted.terms(layer.lora_A.to(dtype), layer.lora_B.to(dtype)).n
        torch.testing.assert_close(n, alone, rtol=1e-6, atol=0)
        layer.adapted.changed()
        assert torch.equal(layer.adapted.n(dtype), n)  # bit for bit, stacked or not


@pytest.mark.parametrize("edit", ["data", "in place", "weight", "assign"])
def test_a_sibling_edited_after_its_norm_was_made_ahead(edit):
    model = stack_of_layers()
    model(torch.randn(70, 12))
    step(model)
    first, second = model[0], model[1]
    first(torch.randn(70, 12))  # makes the norms of the others, too
    with torch.no_grad():
        if edit == "data":
            second.lora_B.data.add_(0.5)
        elif edit == "in place":
            second.lora_B.add_(0.5)
        elif edit == "weight":
            second.weight.mul_(3.0)
        else:
            second.lora_B = nn.Parameter(second.lora_B + 0.5)
    x = torch.randn(70, 12)
    W, A, B, m = (t.detach().double() for t in (second.weight, second.lora_A, second.lora_B, second.magnitude))
    want = reference.forward(x.double(), W, None, A, B, m, second.scaling)
    torch.testing.assert_close(second(x).double().detach(), want, rtol=1e-5, atol=1e-5)


def test_copies_have_a_registry_of_their_own():
    model = stack_of_layers()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        registries = {id(layer.adapted.registry) for _, layer in doratune.adapters(twin)}
        assert len(registries) == 1 and registries != {id(model[0].adapted.registry)}
        assert {weight.layer for weight in twin[0].adapted.registry.weights()} == {layer for _, layer in doratune.adapters(twin)}
        model[0].adapted.registry.generation += 1
        assert twin[0].adapted.registry.generation != model[0].adapted.registry.generation


def test_rows_in_danger_are_left_to_the_exact_way():
    """A layer whose norm cancels is not taken from the stack: the same value as `terms`, from fp32 rows of W."""
    model = stack_of_layers(dtype=torch.bfloat16)
    layer = model[1]
    model(torch.randn(70, 12, dtype=torch.bfloat16))
    with torch.no_grad():
        layer.lora_A.zero_()
        layer.lora_A[0] = layer.weight[3].float()
        layer.lora_B.zero_()
        layer.lora_B[3, 0] = -0.97 / layer.scaling
    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.0).step()  # every norm is old now
    model(torch.randn(70, 12, dtype=torch.bfloat16))
    assert layer.adapted.preparations == 2  # with the others
    n = layer.adapted.n(torch.bfloat16)
    A, B = (t.detach().bfloat16() for t in (layer.lora_A, layer.lora_B))
    want = reference.norm(layer.weight.detach(), A, B, layer.scaling)
    torch.testing.assert_close(n.double(), want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("tokens", [1, 3, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_inference_equals_training(tokens, dtype, method):
    model, layer = one_layer(dtype=dtype, method=method)
    randomize(model.eval())
    x = torch.randn(tokens, 10, dtype=dtype)
    for _ in range(2):
        with torch.no_grad():
            got = layer(x)
        torch.testing.assert_close(got, layer(x).detach(), rtol=1.6e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)
        with torch.no_grad():  # ready factors are made again after any change
            if method == "dora":
                layer.magnitude.mul_(1.5)
            layer.lora_B.mul_(2.0)


def test_a_magnitude_that_becomes_small_between_two_tokens():
    model, layer = one_layer(dtype=torch.bfloat16, bias=False)
    randomize(model.eval())
    x = torch.randn(1, 10, dtype=torch.bfloat16)
    with torch.inference_mode():
        layer(x)
    with torch.no_grad():
        layer.magnitude.mul_(1e-3)
    with torch.inference_mode():
        got = layer(x).double()
    W, A, B, m = (t.detach().double() for t in (layer.weight, layer.lora_A.bfloat16(), layer.lora_B.bfloat16(), layer.magnitude))
    want = reference.forward(x.double(), W, None, A, B, m, layer.scaling)
    assert ((got - want).abs() <= 0.02 * want.abs().max()).all()


def test_factors_are_made_once_for_a_decode():
    model = tiny_llama()
    doratune.attach(model, doratune.AdapterConfig(rank=4), trainable=False)
    randomize(model)
    model.generate(torch.randint(3, 300, (2, 9)), max_new_tokens=12, do_sample=False)
    assert {layer.adapted.preparations for _, layer in doratune.adapters(model)} == {1}


FROZEN = [names for names in ("A", "B", "m", "AB", "Am", "Bm", "")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("mode", ["detached", "full"])
@pytest.mark.parametrize("tokens", [5, 20])
def test_any_part_may_be_frozen(kind, frozen, mode, tokens):
    """What the op keeps for m's gradient depends on what is trained."""
    model, layer = KINDS[kind](norm_gradient=mode)
    randomize(model)
    with torch.no_grad():
        layer.bias.zero_()
    names = {"A": "lora_A", "B": "lora_B", "m": "magnitude"}
    for key, name in names.items():
        getattr(layer, name).requires_grad_(key not in frozen)
    x, dY = torch.randn(tokens, 10), torch.randn(tokens, 13)
    leaf = x.clone().requires_grad_()
    layer(leaf).backward(dY)
    want = exact(layer, x, dY, full=mode == "full")
    for key, name in names.items():
        got = getattr(layer, name).grad
        assert (got is None) == (key in frozen)
        if got is not None:
            torch.testing.assert_close(got.double(), want[key], rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(leaf.grad.double(), want["x"], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("size", [30.0, 300.0])
def test_a_large_bias_does_not_drown_the_gradient(size):
    model, layer = one_layer(64, 64, dtype=torch.bfloat16)
    randomize(model)
    with torch.no_grad():
        layer.bias.copy_(size * torch.randn(64))
    x, dY = torch.randn(256, 64).bfloat16(), torch.randn(256, 64).bfloat16()
    layer(x).backward(dY)
    W, A, B = layer.weight.detach().double(), *(p.detach().bfloat16().double() for p in (layer.lora_A, layer.lora_B))
    m, bias = layer.magnitude.detach().double(), layer.bias.detach().double()
    want = reference.gradients(x.double(), dY.double(), W, bias, A, B, m, layer.scaling)[1]["m"]
    assert (layer.magnitude.grad.double() - want).norm() < 0.01 * want.norm()


@pytest.mark.parametrize("method", ["dora", "lora"])
@pytest.mark.parametrize("bias", [True, False])
def test_selective_checkpointing(method, bias):
    """It replays products by their order: the norm's own must not be among them, and none of its tensors may change."""
    from functools import partial

    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    saved = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    contexts = partial(create_selective_checkpoint_contexts, saved)
    grads = []
    for selective in (True, False):
        model, _ = one_layer(16, 16, rank=4, method=method, bias=bias)
        randomize(model)
        x = torch.randn(16, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
        block = lambda x, model=model: model(x).sigmoid()  # noqa: E731
        y = checkpoint(block, x, use_reentrant=False, context_fn=contexts) if selective else block(x)
        y.square().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def rotary(y):
    """Rotates in the memory of y, as fused kernels do, which autograd does not see."""
    y.detach().numpy()[:] = 7.0


class Rotated(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(10, 13)

    def forward(self, x):
        y = self.layer(x)
        loss = (y * torch.arange(13.0)).sum()
        rotary(y)
        return loss


@pytest.mark.parametrize("how", ["found", "said"])
def test_kernels_that_write_over_the_output_unseen(monkeypatch, how):
    """Fused rotary embeddings rotate q in place without telling autograd: with such kernels in a model y is not read back."""
    import sys
    import types

    monkeypatch.setattr(rotary, "__module__", "liger_kernel.ops.rope" if how == "found" else __name__)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))  # being imported changes nothing
    torch.manual_seed(0)
    model = Rotated()
    plain = copy.deepcopy(model)
    settings = {} if how == "found" else {"keep_base_output": True}
    for one in (model, plain):
        doratune.attach(one, doratune.AdapterConfig(rank=3, targets=["layer"], **settings))
        randomize(one)
    assert model._doratune.overwritten == ("liger_kernel" if how == "found" else "keep_base_output")
    x = torch.randn(20, 10)
    model(x).backward()
    (plain.layer(x) * torch.arange(13.0)).sum().backward()
    torch.testing.assert_close(model.layer.magnitude.grad, plain.layer.magnitude.grad)


def test_an_imported_package_changes_nothing(monkeypatch):
    import sys
    import types

    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    model, _ = one_layer()
    assert model._doratune.overwritten is None


def test_weights_that_come_and_go_at_one_address():
    from torch.func import functional_call

    model, layer = one_layer(64, 64, bias=False)
    randomize(model)
    x, start = torch.randn(5, 64), layer.weight.detach().clone()
    A, B, m = (t.detach().double() for t in (layer.lora_A, layer.lora_B, layer.magnitude))
    with torch.no_grad():
        for i in range(4):
            W = (start * (1 + i) + 0.1 * i).clone()
            want = reference.forward(x.double(), W.double(), None, A, B, m, layer.scaling)
            got = functional_call(model, {"layer.weight": W}, (x,))
            del W
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [5, 20])
def test_other_derivatives_raise_one_clear_line(tokens):
    model, layer = one_layer()
    randomize(model)
    x = torch.randn(tokens, 10, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):  # a gradient penalty: dY itself needs no gradient
        torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="one output gradient at a time"):
        torch.autograd.grad(model(x), [layer.magnitude], torch.randn(3, tokens, 13), is_grads_batched=True)
    with pytest.raises(Exception, match=r"jvp|forward mode|setup_context"), torch.no_grad():
        torch.func.jvp(model, (x.detach(),), (torch.ones_like(x),))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
@pytest.mark.parametrize("gradients", [True, False])
def test_layers_without_inputs_or_outputs(shape, gradients):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: initializing zero-element tensors
        model = nn.Sequential(nn.Linear(*shape))
    plain = copy.deepcopy(model)
    doratune.attach(model, doratune.AdapterConfig(rank=2, targets=["0"]))
    with torch.set_grad_enabled(gradients):
        assert torch.equal(model(torch.ones(3, shape[0])), plain(torch.ones(3, shape[0])))


def test_a_shallow_copy_of_a_layer():
    model, layer = one_layer()
    randomize(model)
    twin = copy.copy(layer)
    assert twin.adapted is not layer.adapted
    number = layer.adapted.handle.tensor.item()
    del twin
    assert layer.adapted.handle.bound() and layer.adapted.handle.tensor.item() == number


def test_parametrized_factors_of_a_sibling():
    from torch.nn.utils import parametrize

    class Double(nn.Module):
        def forward(self, A):
            return 2 * A

    model = stack_of_layers()
    parametrize.register_parametrization(model[1], "lora_A", Double())
    model(torch.randn(70, 12))
    step(model)
    x = torch.randn(70, 12)
    layer = model[1]
    W, A, B, m = (t.detach().double() for t in (layer.weight, layer.lora_A, layer.lora_B, layer.magnitude))
    torch.testing.assert_close(
        layer(x).double().detach(), reference.forward(x.double(), W, None, A, B, m, layer.scaling), rtol=1e-5, atol=1e-5
    )
