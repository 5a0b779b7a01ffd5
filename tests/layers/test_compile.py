"""torch.compile: one opaque node per layer and direction, no graph break, the same numbers, one norm per step and layer."""

import gc

import pytest
import torch
import torch._dynamo
from conftest import one_layer, randomize, tiny_llama
from torch._dynamo.testing import CompileCounterWithBackend

import doratune
from doratune.math import compiled

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own look at it


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def nodes(counter) -> list[str]:
    return [str(n.target) for graph in counter.graphs for n in graph.graph.nodes if "doratune" in str(n.target)]


def results(model, call, x):
    model.zero_grad()
    x = x.clone().requires_grad_(True)
    torch.manual_seed(3)
    y = call(x)
    y.square().sum().backward()
    return {"y": y.detach(), "x": x.grad} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


CASES = {
    "dora": {},
    "no bias": {"bias": False},
    "bf16": {"dtype": torch.bfloat16},
    "dropout": {"dropout": 0.3},
    "full gradient": {"norm_gradient": "full"},
    "magnitude only": {"targets": [], "magnitude_only": ["layer"]},
    "input axis": {"magnitude_axis": "input"},
    "input axis, full": {"magnitude_axis": "input", "norm_gradient": "full"},
    "lora": {"method": "lora"},
}


@pytest.mark.parametrize("name", CASES)
def test_same_numbers_in_one_graph(name):
    model, layer = one_layer(**CASES[name])
    randomize(model)
    x = torch.randn(2, 6, 10, dtype=layer.weight.dtype)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    expected, got = results(model, model, x), results(model, compiled, x)
    assert expected.keys() == got.keys() and len(got) >= 3
    low = layer.weight.dtype == torch.bfloat16  # eager adds the input's two gradients within a product, rounded once
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-2 if low else 1e-5, atol=1e-2 if low else 1e-5)
    assert counter.frame_count == 1
    assert len(nodes(counter)) == (0 if name == "lora" else 1)  # LoRA is left to the compiler


@pytest.mark.parametrize("mode", ["no_grad", "inference"])
def test_without_gradients(mode):
    model, _ = one_layer()
    randomize(model.eval())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad() if mode == "no_grad" else torch.inference_mode():
        x = torch.randn(70, 10)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("trained", [("lora_B",), ("magnitude",), ("lora_A", "lora_B"), ("lora_A", "magnitude")])
def test_partly_frozen_adapters(trained):
    model, layer = one_layer()
    randomize(model)
    for name in ("lora_A", "lora_B", "magnitude"):
        getattr(layer, name).requires_grad_(name in trained)
    x = torch.randn(5, 10)
    expected, got = results(model, model, x), results(model, torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    assert expected.keys() == got.keys()
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_transformer_step_by_step(checkpointing):
    """Zero graph breaks, exactly one norm per optimizer step and layer, and no recompile after the first step."""
    torch.manual_seed(0)
    model = tiny_llama().train()
    model.config.use_cache = False
    doratune.attach(model, doratune.AdapterConfig(rank=2, targets=["q_proj", "up_proj", "down_proj"], dropout=0.1))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = [layer for _, layer in doratune.adapters(model)]
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(
        model, fullgraph=not checkpointing, backend=counter
    )  # transformers' checkpointing wrapper breaks the graph
    optimizer = torch.optim.AdamW(doratune.parameter_groups(model, lr=1e-2))
    ids = torch.randint(3, 300, (2, 16))
    losses, frames = [], []
    for step in range(4):
        for _ in range(3):  # gradient accumulation
            loss = call(input_ids=ids, labels=ids).loss
            loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        frames.append(counter.frame_count)
        assert [layer.adapted.preparations for layer in layers] == [step + 1] * len(layers)
    assert losses[-1] < losses[0]
    assert frames == [frames[0]] * 4
    if not checkpointing:
        assert frames[0] == 1 and len(nodes(counter)) == len(layers)


def test_inductor_trains_like_eager():
    losses = []
    for traced in (False, True):
        torch.manual_seed(0)
        model = tiny_llama(layers=1).train()
        doratune.attach(model, doratune.AdapterConfig(rank=2, targets=["q_proj", "down_proj"]))
        randomize(model, scale=0.02)
        call = torch.compile(model, fullgraph=True) if traced else model
        optimizer = torch.optim.AdamW(doratune.parameter_groups(model, lr=1e-2))
        ids = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(1))
        for _ in range(3):
            loss = call(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_op_by_torchs_own_checks():
    model, layer = one_layer()
    randomize(model)
    x, out = torch.randn(5, 10), torch.randn(5, 13)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    weight = layer.adapted
    settings = 1.0, weight.s, False, torch.float32, 3, weight.handle.tensor
    torch.library.opcheck(
        compiled._compose, (x, out, layer.bias, None, list(weight.tensors()), layer.weight, *settings), test_utils=checks
    )
    model, layer = one_layer(magnitude_axis="input")
    weight = layer.adapted
    settings = 1.0, weight.s, True, torch.float32, 0, weight.handle.tensor
    torch.library.opcheck(
        compiled._compose, (None, x, None, None, list(weight.tensors()), layer.weight, *settings), test_utils=checks
    )
    ids = torch.tensor([[1, 5], [9, 0]])
    inputs = ids, layer.weight, weight.handle.tensor, torch.float32
    found = torch.library.opcheck(compiled.frozen_rows, inputs, test_utils=checks[:2])
    assert set(found.values()) == {"SUCCESS"}


def test_copies_have_handles_of_their_own():
    import copy
    import pickle

    model, layer = one_layer()
    randomize(model)
    twin, thawed = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    numbers = {m.layer.adapted.handle.tensor.item() for m in (model, twin, thawed)}
    assert len(numbers) == 3
    with torch.no_grad():
        twin.layer.weight.mul_(2.0)
    x = torch.randn(70, 10)
    expected = twin(x).detach()
    torch.testing.assert_close(torch.compile(twin, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.compile(thawed, fullgraph=True, backend="aot_eager")(x), model(x))


def test_a_layer_that_is_gone():
    model, layer = one_layer()
    number = layer.adapted.handle.tensor
    del model, layer
    gc.collect()
    with pytest.raises(RuntimeError, match=r"is not in this process; .* compile or export again"):
        compiled.weight_of(number)


def test_double_backward_is_refused():
    model, _ = one_layer()
    randomize(model)
    x = torch.randn(3, 10, requires_grad=True)
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    with pytest.raises(RuntimeError, match=r"double backward|does not require grad|once_differentiable"):
        torch.autograd.grad(y.sum(), x, create_graph=True)[0].sum().backward()


def test_blocks_compiled_one_by_one_share_their_code():
    """More blocks than Dynamo's limit of recompilations."""
    torch.manual_seed(0)
    model = tiny_llama(layers=12).train()
    doratune.attach(model, doratune.AdapterConfig(rank=2, targets=["q_proj", "down_proj"]))
    randomize(model, scale=0.02)
    ids = torch.randint(3, 300, (2, 16))
    expected = model(input_ids=ids, use_cache=False).logits
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.model.layers:
        block.compile(fullgraph=True, backend=counter)
    for _ in range(2):
        logits = model(input_ids=ids, use_cache=False).logits
        logits.square().mean().backward()
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2  # the first block's input alone needs no gradient


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_in_place_operations_in_compiled_code(backend):
    model, _ = one_layer()
    randomize(model)
    x = torch.randn(9, 10)
    expected = results(model, lambda x: torch.relu(model(x)) * 2, x)
    got = results(model, torch.compile(lambda x: torch.relu_(model(x)) * 2, fullgraph=True, backend=backend), x)
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", ["output", "input"])
def test_inductor_on_a_transposed_input(axis):
    model, _ = one_layer(magnitude_axis=axis)
    randomize(model)
    x = torch.randn(10, 20).T.requires_grad_()
    y = torch.compile(model, fullgraph=True)(x)
    torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)
    y.sum().backward()
