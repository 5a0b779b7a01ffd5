"""Nothing derived from a parameter outlives it: averages swapped in and out, replaced tensors, trained and edited base weights.

Every write is followed by what a freshly built model with the same values says. Writes through `.data` bump no version counter,
fused optimizers neither; inputs are as small as a decode's, where no check of the values may be left out.
"""

import copy
import warnings

import pytest
import reference
import torch
import torch._dynamo
from conftest import tiny_llama
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_avg_fn
from twins import CASES, FEW, MIDDLE, TOLERANCE, WIDTH, chain, error, fresh, gradients, moved, outputs, trained, values

import doratune

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own look at it

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SIZES = pytest.mark.parametrize(
    ("tokens", "dtype"), [(1, torch.float32), (100, torch.float32), (1, torch.bfloat16)], ids=["1-fp32", "100-fp32", "1-bf16"]
)
FAR = 0.03
"""Two sets of values give outputs at least this far apart, else a test would see nothing."""


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def EMAModel():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what diffusers imports
        return pytest.importorskip("diffusers.training_utils").EMAModel


def swapped(model):
    """Values of another state of the model's training."""
    return [p.detach().clone() for p in trained(moved(copy.deepcopy(model), seed=7))]


# ---------------------------------------------------------------------------------------------- averages, swapped in and out


@BOTH
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_averages_of_diffusers(EMAModel, case, foreach, dtype):
    """store, copy_to, evaluate, restore: the way of every training script of diffusers."""
    model, close = chain(case, dtype), TOLERANCE[dtype]
    average = EMAModel(trained(model), decay=0.8, min_decay=0.8, foreach=foreach)
    for seed in (1, 2):
        moved(model, seed)
        average.step(trained(model))
    own, state = outputs(model, dtype=dtype), values(model)
    for _ in range(2):
        average.store(trained(model))
        average.copy_to(trained(model))
        averaged, want = outputs(model, dtype=dtype), outputs(fresh(case, values(model), dtype), dtype=dtype)
        assert error(want, own) > FAR
        assert error(averaged, want) < close, "averaged"
        average.restore(trained(model))
        assert error(outputs(model, dtype=dtype), own) < close, "restored"
    assert all(torch.equal(model.state_dict()[name], t) for name, t in state.items())
    assert error(own, outputs(fresh(case, state, dtype), dtype=dtype)) < close


AVERAGES = {
    "equal weights": {},
    "equal weights, one by one": {"avg_fn": get_swa_avg_fn()},
    "exponential, foreach": {"multi_avg_fn": get_ema_multi_avg_fn(0.5)},
}


@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("case", FEW)
def test_averages_of_torch(case, kind):
    """AveragedModel: its own copy after each update, and the model after the averages were copied into it and back."""
    model = chain(case)
    average = AveragedModel(model, **AVERAGES[kind])
    for seed in (1, 2, 3):
        moved(model, seed)
        average.update_parameters(model)
        assert error(outputs(average), outputs(fresh(case, values(average.module)))) < 1e-5
    own, kept = outputs(model), values(model)
    for p, a in zip(model.parameters(), average.module.parameters(), strict=True):
        p.data.copy_(a.data)
    want = outputs(fresh(case, values(average.module)))
    assert error(want, own) > FAR
    assert error(outputs(model), want) < 1e-5
    for name, p in model.named_parameters():
        p.data.copy_(kept[name])
    assert error(outputs(model), own) < 1e-5


def one_by_one(parameters, new):
    for p, t in zip(parameters, new, strict=True):
        p.data.copy_(t)


def of_lists(parameters, new):
    torch._foreach_copy_([p.data for p in parameters], new)


def towards(parameters, new):
    torch._foreach_lerp_([p.data for p in parameters], new, 1.0)


def in_inference_mode(parameters, new):
    with torch.inference_mode():
        one_by_one(parameters, new)


def as_arrays(parameters, new):
    for p, t in zip(parameters, new, strict=True):
        p.detach().numpy()[...] = t.numpy()


def other_memory(parameters, new):
    for p, t in zip(parameters, new, strict=True):
        p.data = t.clone()


def one_vector(parameters, new):
    vector_to_parameters(parameters_to_vector(new), parameters)


def of_storages(parameters, new):
    for p, t in zip(parameters, new, strict=True):
        p.untyped_storage().copy_(t.untyped_storage())


CHANGES = (one_by_one, of_lists, towards, in_inference_mode, as_arrays, other_memory, one_vector, of_storages)
WRITES = {f.__name__: f for f in CHANGES}


def layer_by_layer(model):
    return lambda x: model[1](model[0](x))


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("case", FEW)
@pytest.mark.parametrize("through", ["model", "layers"])
def test_swaps_by_hand(case, write, through):
    """Also where the layers are called without the model around them."""
    model = chain(case)
    call = model if through == "model" else layer_by_layer(model)
    new, old, own = swapped(model), [p.detach().clone() for p in trained(model)], outputs(call)
    for tokens in ((1, 4, 8), (8, 1)):
        before = outputs(call, tokens)
        WRITES[write](trained(model), new)
        want = outputs(fresh(case, values(model)), tokens)
        assert error(want, before) > FAR
        assert error(outputs(call, tokens), want) < 1e-5, "swapped"
        WRITES[write](trained(model), old)
        assert error(outputs(call, tokens), before) < 1e-5, "back"
    assert error(outputs(call), own) < 1e-5


@BOTH
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("case", CASES)
def test_each_parameter_alone(case, mode, dtype):
    """A single one of A, B, m, or of another direction's, written between two calls of one token."""
    model = chain(case, dtype)
    x = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(3)).to(dtype)
    for name, p in model.named_parameters():
        if p.requires_grad:
            with mode():
                before = model(x).clone()
                p.data.copy_(p.data.flip(0) * 1.5 + 0.05)
                got = model(x).clone()
            with torch.no_grad():
                want = fresh(case, values(model), dtype)(x)
            assert error(want, before) > FAR / 10, f"{name}: nothing to see"
            assert error(got, want) < TOLERANCE[dtype], f"{name}: stale"


@pytest.mark.parametrize("case", ["dora", "dora, input", "dvora", "lora"])
def test_swaps_between_calls_with_gradients(case):
    """The gradients, too, are those of the values of now."""
    model, x = chain(case), torch.randn(4, WIDTH)
    for seed in (3, 4):
        gradients(model, x)
        one_by_one(trained(model), [p.detach().clone() for p in trained(moved(copy.deepcopy(model), seed))])
        assert error(gradients(model, x), gradients(fresh(case, values(model)), x)) < 1e-5


@pytest.mark.parametrize("write", ["one_by_one", "of_lists"])
@pytest.mark.parametrize("method", ["dora", "dvora", "lora"])
def test_swaps_before_generation(method, write):
    def adapted():
        return doratune.attach(tiny_llama(layers=1), doratune.AdapterConfig(rank=4, method=method))

    def logits(model):
        made = model.generate(
            prompt, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True, eos_token_id=None
        )
        return torch.stack(made.logits)

    prompt = torch.randint(3, 300, (1, 3), generator=torch.Generator().manual_seed(0))
    model = moved(adapted())
    own, old, new = logits(model), [p.detach().clone() for p in trained(model)], swapped(model)
    WRITES[write](trained(model), new)
    twin = adapted()
    twin.load_state_dict(values(model))
    want = logits(twin)
    assert error(want, own) > FAR
    assert error(logits(model), want) < 1e-5
    WRITES[write](trained(model), old)
    assert error(logits(model), own) < 1e-5


@pytest.mark.parametrize("case", ["dora", "dora, input", "dvora", "dlokr", "lora", "magnitude only"])
def test_swaps_around_compiled_calls(case):
    model = chain(case)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    new, old, own = swapped(model), [p.detach().clone() for p in trained(model)], outputs(compiled, (4,))
    assert error(own, outputs(fresh(case, values(model)), (4,))) < 1e-5
    for _ in range(2):
        of_lists(trained(model), new)
        want = outputs(fresh(case, values(model)), (4,))
        assert error(want, own) > FAR
        assert error(outputs(compiled, (4,)), want) < 1e-5
        one_by_one(trained(model), old)
        assert error(outputs(compiled, (4,)), own) < 1e-5


@pytest.mark.parametrize("weight", [False, True], ids=["adapter", "weight"])
@pytest.mark.parametrize("case", FEW)
def test_merging_after_a_swap(case, weight):
    """What is merged is what the values of now say, and so is what comes back."""
    model = chain(case)
    own = outputs(model)
    if weight:
        for layer in model:
            layer.weight.data.mul_(uneven(layer.weight))
    else:
        one_by_one(trained(model), swapped(model))
    want = outputs(fresh(case, values(model)))
    assert error(want, own) > FAR
    doratune.merge(model)
    assert error(outputs(model), want) < 1e-5, "merged"
    doratune.unmerge(model)
    assert error(outputs(model), want) < 1e-5, "unmerged"


# ---------------------------------------------------------------------------------------------- functional_call


def replacements(case, which):
    """(a chain, other values for some of its tensors by name)."""
    model = chain(case)
    other = values(moved(copy.deepcopy(model), seed=7)) | {}
    for i, size in ((0, (MIDDLE, WIDTH)), (1, (WIDTH, MIDDLE))):
        other[f"{i}.weight"] = torch.randn(size, generator=torch.Generator().manual_seed(i)) * (1 + i)
    names = {p for p, _ in model.named_parameters() if "weight" not in p and "bias" not in p}
    chosen = {"adapter": names, "weight": {"0.weight", "1.weight"}}
    chosen["all"] = chosen["adapter"] | chosen["weight"]
    chosen |= {"one " + name: {n for n in names if n.endswith(name)} for name in ("lora_A", "lora_B", "magnitude")}
    return model, {name: other[name] for name in sorted(chosen[which])}


def check_replaced(case, which, call, sizes=(4,)):
    """`call(model, new, x)` says what a fresh copy of those values says, and the model itself keeps saying what it said."""
    model, new = replacements(case, which)
    state = values(model)
    twin = fresh(case, state | new)
    inputs = [torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(n)) for n in sizes]
    few = inputs[0]
    for x in inputs:
        with torch.no_grad():
            own = model(x).clone()
            got, want = call(model, new, x), twin(x)
            assert error(want, own) > FAR
            assert error(got, want) < 1e-5, "without gradients"
            assert torch.equal(model(x), own), "the model's own output"
    own, want = gradients(model, few), gradients(twin, few)
    leaves = {name: t.clone().requires_grad_("weight" not in name and "start" not in name) for name, t in new.items()}
    x = few.clone().requires_grad_()
    y = call(model, leaves, x)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
    got = {"y": y.detach(), "x": x.grad} | {name: t.grad for name, t in leaves.items() if t.grad is not None}
    for name, p in model.named_parameters():
        if p.grad is not None:
            got[name], p.grad = p.grad, None
    assert error(got, want) < 1e-5, "with gradients"
    after = gradients(model, few)
    assert all(torch.equal(after[key], own[key]) for key in own), "the model's own gradients"
    with torch.no_grad():
        assert error(model(few), fresh(case, state)(few)) < 1e-5, "the model's own output, afterwards"


@pytest.mark.parametrize("which", ["adapter", "weight", "all"])
@pytest.mark.parametrize("case", CASES)
def test_functional_call(case, which):
    check_replaced(case, which, functional_call, (4, 70))


@pytest.mark.parametrize("which", ["one lora_A", "one lora_B", "one magnitude"])
@pytest.mark.parametrize("case", ["dora", "dora, input"])
def test_functional_call_of_one_tensor(case, which):
    check_replaced(case, which, functional_call)


@pytest.mark.parametrize(
    ("case", "which"),
    [("dora", "adapter"), ("dora", "weight"), ("dora, input", "all"), ("dvora", "all"), ("lora", "all")],
)
def test_functional_call_of_a_compiled_model(case, which):
    made = {}

    def call(model, new, x):
        if model not in made:
            made[model] = torch.compile(model, fullgraph=True, backend="aot_eager")
            made[model](x)  # compiled with its own values
        return functional_call(made[model], {f"_orig_mod.{name}": t for name, t in new.items()}, (x,))

    check_replaced(case, which, call)
    for model, compiled in made.items():
        assert error(outputs(compiled, (4,)), outputs(model, (4,))) < 1e-5, "the compiled model's own output, afterwards"


@pytest.mark.parametrize(
    ("case", "which"),
    [
        *(("dora", which) for which in ("adapter", "weight", "all")),
        *((case, "adapter") for case in ("dvora", "dlokr", "dora, pissa")),
        *((case, "weight") for case in ("dora, input", "dvora", "magnitude only")),
        ("dora, full", "all"),
    ],
)
def test_a_compiled_function_that_calls_functionally(case, which):
    call = torch.compile(lambda model, new, x: functional_call(model, new, (x,)), fullgraph=True, backend="aot_eager")
    check_replaced(case, which, call)


# ---------------------------------------------------------------------------------------------- the base's weight

OPTIMIZERS = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.05, foreach=False, fused=False),
    "adamw foreach": lambda ps: torch.optim.AdamW(ps, lr=0.05, foreach=True),
    "adamw fused": lambda ps: torch.optim.AdamW(ps, lr=0.05, fused=True),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05),
    "sgd fused": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, fused=True),
}


def check_now(case, model, x, message):
    """Outputs of both modes and all gradients, against a fresh copy; x of one dtype with the model."""
    twin, close = fresh(case, values(model), x.dtype), TOLERANCE[x.dtype]
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.requires_grad_(p.requires_grad)
    with torch.no_grad():
        assert error(model(x), twin(x)) < close, (message, "without gradients")
    assert error(gradients(model, x), gradients(twin, x)) < close, (message, "with gradients")


@SIZES
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("case", ["dora", "dora, input", "dora, full", "dvora", "magnitude only", "lora"])
def test_a_trained_weight(case, name, tokens, dtype):
    """W unfrozen next to its adapter."""
    model = chain(case, dtype)
    for layer in model:
        layer.weight.requires_grad_(True)
    optimizer = OPTIMIZERS[name](trained(model))
    x = torch.randn(tokens, WIDTH).to(dtype)
    for step in range(2):
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        check_now(case, model, x, step)


@pytest.mark.parametrize("case", ["dora", "dora, input", "lora"])
def test_the_gradient_of_a_trained_weight(case):
    """g ⊙ dYᵀ·x with the norm held constant, against the dense formula in float64."""
    model, axis = chain(case, torch.float64), CASES[case].get("magnitude_axis", "output")
    layer, x, dY = model[0], torch.randn(9, WIDTH).double(), torch.randn(9, MIDDLE).double()
    layer.weight.requires_grad_(True)
    layer(x).backward(dY)
    W = layer.weight.detach().clone().requires_grad_()
    A, B, m = (None if t is None else t.detach() for t in (layer.lora_A, layer.lora_B, layer.magnitude))
    reference.forward(x, W, layer.bias.detach(), A, B, m, layer.scaling, axis).backward(dY)
    assert error(layer.weight.grad, W.grad) < 1e-9


def uneven(p):
    return (0.5 + 2 * torch.rand(p.shape, generator=torch.Generator().manual_seed(1))).to(p)


def as_array(p):
    """The very memory of a tensor; numpy knows no bf16."""
    return p.detach().view(torch.int32 if p.dtype.itemsize == 4 else torch.int16).numpy()


EDITS = {
    "mul_": lambda p: p.data.mul_(uneven(p)),
    "add_": lambda p: p.data.add_(0.3),
    "copy_": lambda p: p.data.copy_(p.data.flip(1) * 2),
    "foreach": lambda p: torch._foreach_add_([p.data], [0.3 * torch.ones_like(p)]),
    "array": lambda p: as_array(p).__setitem__(..., as_array(p)[::-1, ::-1].copy()),
    "new memory": lambda p: setattr(p, "data", p.data.flip(1) * 2),
    "counted": lambda p: p.detach().mul_(uneven(p)),
}


@SIZES
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("case", ["dora", "dora, input", "dora, full", "dora, pissa", "dvora", "dlokr", "magnitude only", "lora"])
def test_an_edited_frozen_weight(case, edit, tokens, dtype):
    model, x = chain(case, dtype), torch.randn(tokens, WIDTH).to(dtype)
    for round_ in range(2):  # with nothing to prepare, without gradients first and with gradients first
        gradients(model, x)
        with torch.no_grad():
            before = model(x).clone()
        for layer in model:
            EDITS[edit](layer.weight)
        twin = fresh(case, values(model), dtype)
        if round_:
            assert error(gradients(model, x), gradients(twin, x)) < TOLERANCE[dtype], "with gradients"
        else:
            with torch.no_grad():
                assert error(twin(x), before) > FAR
                assert error(model(x), twin(x)) < TOLERANCE[dtype], "without gradients"
        check_now(case, model, x, "after")


@pytest.mark.parametrize(("case", "edit"), [("dora", "mul_"), ("dora, input", "mul_"), ("dvora", "mul_"), ("dora", "new memory")])
def test_an_edited_weight_of_a_compiled_model(case, edit):
    model, x = chain(case), torch.randn(4, WIDTH)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert error(gradients(compiled, x), gradients(fresh(case, values(model)), x)) < 1e-5, "before"
        for layer in model:
            EDITS[edit](layer.weight)
        assert error(gradients(compiled, x), gradients(fresh(case, values(model)), x)) < 1e-5, "after"
        with torch.no_grad():
            assert error(compiled(x), fresh(case, values(model))(x)) < 1e-5, "without gradients"


@pytest.mark.parametrize(("case", "name"), [("dora", "adamw fused"), ("dora, input", "adamw fused"), ("dvora", "adamw foreach")])
def test_a_trained_weight_of_a_compiled_model(case, name):
    model, x = chain(case), torch.randn(4, WIDTH)
    for layer in model:
        layer.weight.requires_grad_(True)
    compiled, optimizer = torch.compile(model, fullgraph=True, backend="aot_eager"), OPTIMIZERS[name](trained(model))
    for _ in range(2):
        compiled(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        twin = fresh(case, values(model))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.requires_grad_(p.requires_grad)
        assert error(gradients(compiled, x), gradients(twin, x)) < 1e-5
