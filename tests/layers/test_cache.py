"""The norm is right after every kind of parameter change, and computed once per change."""

import copy
import pickle
from unittest import mock

import pytest
import reference
import torch
from conftest import one_layer, randomize, tiny_llama
from torch.utils.checkpoint import checkpoint

import doratune

ROWS, COLUMNS = 13, 10


def evaluations(model):
    return [layer.adapted.preparations for _, layer in doratune.adapters(model)]


def check_norm(layer, tokens=3):
    """What a call of this size uses for n must be the norm of the parameters as they are now."""
    x = torch.randn(tokens, layer.weight.shape[1], dtype=layer.weight.dtype)
    layer(x)
    dtype = layer.weight.dtype
    n = layer.adapted.n(dtype)
    exact = reference.norm(layer.weight, layer.lora_A.to(dtype), layer.lora_B.to(dtype), layer.scaling)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-4
    assert ((n.double() - exact).abs() / exact).max() < tolerance


def backward(model, tokens=3):
    model(torch.randn(tokens, COLUMNS)).square().sum().backward()


OPTIMIZERS = {
    "adamw plain": lambda ps: torch.optim.AdamW(ps, lr=0.1, foreach=False, fused=False),
    "adamw foreach": lambda ps: torch.optim.AdamW(ps, lr=0.1, foreach=True),
    "adamw fused": lambda ps: torch.optim.AdamW(ps, lr=0.1, fused=True),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "sgd fused momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("tokens", [3, 100])
def test_after_optimizer_steps(name, tokens):
    model, layer = one_layer(ROWS, COLUMNS)
    randomize(model)
    optimizer = OPTIMIZERS[name](doratune.parameter_groups(model))
    for _ in range(20):
        backward(model, tokens)
        optimizer.step()
        optimizer.zero_grad()
        check_norm(layer, tokens)
        with torch.no_grad():
            check_norm(layer, 1)


@pytest.mark.parametrize("tokens", [3, 100])
def test_after_hand_written_steps(tokens):
    """`.data` writes bump no version and announce themselves to nobody."""
    model, layer = one_layer(ROWS, COLUMNS)
    randomize(model)
    for _ in range(20):
        backward(model, tokens)
        for p in model.parameters():
            if p.grad is not None:
                p.data.add_(p.grad, alpha=-0.01)
                p.grad = None
        check_norm(layer, tokens)


def test_fingerprint_sees_every_kind_of_edit():
    """Sign flips and permutations keep sums and xors; the hash must still differ."""
    model, layer = one_layer(ROWS, COLUMNS)
    randomize(model)
    for edit in (
        lambda t: t.neg_(),
        lambda t: t.copy_(t.flip(0)),
        lambda t: t.mul_(2),
        lambda t: t.view(-1)[:2].copy_(t.view(-1)[:2].flip(0)),
    ):
        edit(layer.lora_B.data)
        check_norm(layer)
        edit(layer.lora_A.data)
        check_norm(layer)


def test_refresh_covers_what_nothing_else_sees():
    model, layer = one_layer(ROWS, COLUMNS)
    randomize(model)
    x = torch.randn(1, COLUMNS)
    with torch.no_grad():
        layer(x)
        layer.lora_B.data.mul_(3)
        doratune.refresh(model)
        check_norm(layer, 1)


def test_after_load_copy_and_dtype():
    model, layer = one_layer(ROWS, COLUMNS)
    randomize(model)
    other = randomize(one_layer(ROWS, COLUMNS)[0], seed=5).state_dict()
    with torch.no_grad():
        check_norm(layer, 1)
        model.load_state_dict(other)
        check_norm(layer, 1)
        layer.lora_A.copy_(torch.randn_like(layer.lora_A))
        check_norm(layer, 1)
        layer.weight.copy_(torch.randn_like(layer.weight))
        check_norm(layer, 1)
        model.to(torch.bfloat16)
        check_norm(layer, 1)
        model.load_state_dict({k: v.clone().mul_(1.5) for k, v in other.items()}, assign=True)
        check_norm(layer, 1)
        assert layer.lora_A.dtype == torch.float32


def test_assigned_low_precision_becomes_fp32():
    model, layer = one_layer(ROWS, COLUMNS)
    model.load_state_dict({k: v.bfloat16() for k, v in randomize(model).state_dict().items()}, assign=True)
    assert {p.dtype for p in (layer.lora_A, layer.lora_B, layer.magnitude)} == {torch.float32}
    assert layer.weight.dtype == torch.bfloat16
    check_norm(layer)


def test_copies_neither_share_nor_pollute():
    model, layer = one_layer(ROWS, COLUMNS)
    randomize(model)
    check_norm(layer)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.layer.lora_B.mul_(3)
    check_norm(twin.layer)
    check_norm(layer)
    loaded = pickle.loads(pickle.dumps(model))
    loaded.layer.lora_A.data.mul_(2)
    check_norm(loaded.layer)
    check_norm(layer)
    x = torch.randn(4, COLUMNS)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_functional_call_and_ema_swap():
    model, layer = one_layer(ROWS, COLUMNS)
    randomize(model)
    x = torch.randn(4, COLUMNS)
    own = model(x)
    ema = {k: v.detach() * 0.5 for k, v in model.state_dict().items() if "lora" in k}
    swapped = torch.func.functional_call(model, ema, (x,))
    plain = copy.deepcopy(model)
    plain.load_state_dict(plain.state_dict() | ema)
    assert torch.equal(swapped, plain(x))
    assert torch.equal(model(x), own)
    kept = {k: v.detach().clone() for k, v in model.state_dict().items()}
    for name, p in model.named_parameters():  # the usual EMA swap: evaluate with averages, go back
        if name in ema:
            p.data, kept[name] = ema[name].clone(), p.data
    assert torch.equal(model(x), swapped)
    with torch.no_grad():
        assert torch.equal(model(x[:1]), torch.func.functional_call(plain, {}, (x[:1],)))
    for name, p in model.named_parameters():
        if name in ema:
            p.data = kept[name]
    assert torch.equal(model(x), own)


def test_inference_mode_then_training():
    model, layer = one_layer(ROWS, COLUMNS)
    randomize(model)
    with torch.inference_mode():
        model(torch.randn(100, COLUMNS))
    backward(model)
    check_norm(layer)
    optimizer = torch.optim.SGD(doratune.parameter_groups(model))
    optimizer.step()
    check_norm(layer)


@pytest.mark.parametrize("reentrant", [True, False])
def test_once_per_step_under_accumulation_and_checkpointing(reentrant):
    """Gradient accumulation 8 with checkpointing: one norm a layer and step, and the same gradients as without."""
    torch.manual_seed(0)
    model, _ = one_layer(ROWS, COLUMNS)
    randomize(model)
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(doratune.parameter_groups(model), fused=True)
    start = evaluations(model)[0]
    for step in range(3):
        batches = [torch.randn(80, COLUMNS, requires_grad=True) for _ in range(8)]
        for x in batches:
            checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
            if step == 0:
                plain(x).square().sum().backward()
        if step == 0:
            for (name, p), q in zip(model.named_parameters(), plain.parameters()):
                if p.grad is not None:
                    torch.testing.assert_close(p.grad, q.grad, msg=name)
        assert evaluations(model)[0] - start == step + 1
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", [{"use_reentrant": True}, {"use_reentrant": False}])
def test_once_per_step_in_a_transformer(kind):
    model = tiny_llama().train()
    model.activation_checkpointing_enable(kind)
    model.enable_input_require_grads()
    doratune.attach(model, doratune.AdapterConfig(rank=4))
    optimizer = torch.optim.AdamW(doratune.parameter_groups(model))
    for step in range(2):
        for _ in range(8):
            ids = torch.randint(3, 300, (4, 20))
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        assert set(evaluations(model)) == {step + 1}
        optimizer.step()
        optimizer.zero_grad()


def test_never_by_a_decode():
    model = tiny_llama()
    doratune.attach(model, doratune.AdapterConfig(rank=4), trainable=False)
    randomize(model)
    model.generate(torch.randint(3, 300, (2, 9)), max_new_tokens=12, do_sample=False)
    assert set(evaluations(model)) == {1}


def test_bytes_kept_for_backward():
    """Counted with saved-tensor hooks: x, y and T·R numbers; LoRA keeps no output-sized tensor."""
    T, O, I, R = 64, 40, 24, 4
    kept = {}
    for method in ("lora", "dora"):
        model, layer = one_layer(O, I, bias=False, rank=R, method=method)
        own = {p.data_ptr() for p in model.parameters()}
        seen = {}

        def pack(t, seen=seen, own=own):
            if t.untyped_storage().data_ptr() not in own:
                seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        x = torch.randn(T, I, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(x)
        kept[method] = sum(seen.values())
    assert kept["lora"] == 4 * (T * I + T * R)
    assert kept["dora"] == 4 * (T * I + T * R + T * O)


def test_no_output_by_input_temporary():
    """Neither B·A nor a copy of W appears in forward, backward, attach or verify."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        largest, weight = 0, None

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if torch.is_tensor(t) and t.untyped_storage().data_ptr() != Sizes.weight:
                    Sizes.largest = max(Sizes.largest, t.numel())
            return out

    model = torch.nn.Sequential(torch.nn.Linear(512, 600, bias=False))
    Sizes.weight = model[0].weight.untyped_storage().data_ptr()
    with mock.patch("doratune.bases.dense.TILE_NUMBERS", 2**12), Sizes():
        for mode in ("detached", "full"):
            doratune.attach(model, doratune.AdapterConfig(rank=4, targets=["0"], norm_gradient=mode))
            randomize(model, scale=0.01)
            model(torch.randn(8, 512)).sum().backward()
            doratune.verify(model)
            doratune.detach(model)
    assert Sizes.largest < 512 * 600 / 4


def test_fresh_tensors_at_a_freed_address():
    """functional_call and `.data =` with new tensors each time: memory is reused, the norm must not be."""
    model, layer = one_layer(64, 64)
    randomize(model)
    x = torch.randn(1, 64)

    def fresh(seed):
        return torch.randn(64, 3, generator=torch.Generator().manual_seed(seed))

    def dense(B):
        args = layer.weight, layer.bias, layer.lora_A, B, layer.magnitude
        return reference.forward(x.double(), *(t.double() for t in args), layer.scaling)

    with torch.no_grad():
        for seed in range(300):
            y = torch.func.functional_call(model, {"layer.lora_B": fresh(seed)}, (x,))
            torch.testing.assert_close(y.double(), dense(fresh(seed)), rtol=1e-4, atol=1e-4)
        for seed in range(300):
            layer.lora_B.data = fresh(seed)
            torch.testing.assert_close(model(x).double(), dense(layer.lora_B), rtol=1e-4, atol=1e-4)


def test_the_step_token_alone_is_enough():
    """A fused step bumps no version; a gradient-free call of one token hashes nothing."""
    model, layer = one_layer(ROWS, COLUMNS)
    randomize(model)
    optimizer = torch.optim.AdamW(doratune.parameter_groups(model, lr=0.1), fused=True)
    backward(model)
    optimizer.step()
    with torch.no_grad():
        check_norm(layer, 1)


def test_one_norm_per_compute_dtype():
    """Plain and autocast calls by turns: A and B are rounded differently, so the norm differs."""
    model, layer = one_layer(ROWS, COLUMNS)
    randomize(model)
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            n = layer.adapted.n(dtype)
            exact = reference.norm(layer.weight, layer.lora_A.to(dtype), layer.lora_B.to(dtype), layer.scaling)
            assert ((n.double() - exact).abs() / exact).max() < 1e-5


def test_refresh_after_a_hand_edit_of_the_weight():
    model, layer = one_layer(ROWS, COLUMNS)
    randomize(model)
    check_norm(layer)
    layer.weight.data.mul_(2)
    doratune.refresh(model)
    check_norm(layer)


def test_no_grad_calls_of_many_tokens_are_hashed():
    model, layer = one_layer(ROWS, COLUMNS)
    randomize(model)
    with torch.no_grad():
        for _ in range(3):
            layer.lora_A.data.mul_(1.5)
            check_norm(layer, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fingerprint_sees_flipped_signs(dtype):
    """Even numbers of flipped top bits cancel in a plain dot product modulo 2**64."""
    model, layer = one_layer(16, 10, dtype=dtype, rank=4)
    randomize(model)
    for edit in (lambda B: B[:, 1].neg_(), lambda B: B[:, 0].neg_(), lambda B: B.neg_()):
        layer(torch.randn(70, 10, dtype=dtype))
        before = evaluations(model)[0]
        edit(layer.lora_B.data)
        layer(torch.randn(70, 10, dtype=dtype))
        assert evaluations(model)[0] == before + 1


def test_parameters_born_in_inference_mode_have_no_versions():
    with torch.inference_mode():
        model, layer = one_layer(bias=False)
        randomize(model)
        x = torch.randn(5, 10)
        model(x)
        layer.magnitude.mul_(2.0)
        twice = model(x)
        layer.lora_B.mul_(2.0)
        got = model(x)
        W, A, B, m = (t.double() for t in (layer.weight, layer.lora_A, layer.lora_B, layer.magnitude))
        want = reference.forward(x.double(), W, None, A, B, m, layer.scaling)
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(got, twice)
