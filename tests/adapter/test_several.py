"""Several adapters on one model: switching, the base in a block, sums and lines, an adapter for each example."""

import copy
import pickle
import threading

import dense
import pytest
import torch
from conftest import randomize, tiny_llama

import doratune
from doratune.errors import UserError

IDS = torch.randint(dense.TOKENS, (6, 5), generator=torch.Generator().manual_seed(0))


def base(dtype=torch.float32):
    torch.manual_seed(0)
    return dense.Mixed().to(dtype)


SETTINGS = {
    "a": {"rank": 2, "targets": ["up", "down"]},
    "b": {"rank": 3, "targets": ["up", "mix"], "start": "pissa"},
    "lora": {"rank": 2, "method": "lora", "targets": ["up", "mix"]},
    "vera": {"rank": 2, "method": "dvora", "targets": ["down", "up"]},
    "m": {"rank": 2, "targets": ["up"], "magnitude_only": ["down"]},
    "conv": {"rank": 2, "targets": ["conv", "embed"]},
}


def attached(*names, dtype=torch.float32, **more):
    """A model with these adapters, each away from its start; the last one is in use."""
    model = base(dtype)
    for seed, name in enumerate(names):
        doratune.attach(model, doratune.AdapterConfig(**SETTINGS[name] | more), name=name)
        randomize(model, seed)
    return model


def alone(name, seed, dtype=torch.float32, **more):
    """The same adapter on a model of its own."""
    model = doratune.attach(base(dtype), doratune.AdapterConfig(**SETTINGS[name] | more))
    return randomize(model, seed)


def out(model, ids=IDS):
    with torch.no_grad():
        return model(ids)


def off(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def test_each_adapter_is_as_if_it_were_alone():
    order = ("a", "b", "lora", "vera", "m", "conv")
    model = attached(*order)
    assert doratune.names(model) == ["conv", "a", "b", "lora", "vera", "m"]
    for seed, name in enumerate(order):
        assert torch.equal(out(doratune.use(model, name)), out(alone(name, seed))), name
    assert torch.equal(out(doratune.use(model, None)), out(base()))


def test_training_one_leaves_the_others_as_they_were():
    model = attached("a", "b")
    before = out(doratune.use(model, "a"))
    doratune.use(model, "b")
    optimizer = torch.optim.AdamW(doratune.parameter_groups(model, lr=0.1))
    model(IDS).square().mean().backward()
    doratune.use(model, "a")
    doratune.use(model, "b")  # the optimizer still has its parameters
    optimizer.step()
    assert off(out(model), out(alone("b", 1))) > 0.01
    assert torch.equal(out(doratune.use(model, "a")), before)


def test_requires_grad_and_the_base_come_back():
    model = base()
    model.up.weight.requires_grad_(False)
    before = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    doratune.attach(model, doratune.AdapterConfig(**SETTINGS["a"]), name="a")
    doratune.attach(model, doratune.AdapterConfig(**SETTINGS["b"]), name="b")
    assert not model.conv.weight.requires_grad
    doratune.delete(model, "b")
    assert {name: (p, p.requires_grad) for name, p in model.named_parameters()} == before
    doratune.use(model, "a")
    assert not model.conv.weight.requires_grad
    assert sorted({n for n, p in model.named_parameters() if p.requires_grad}) == sorted(
        f"{layer}.{p}" for layer in ("up", "down") for p in ("lora_A", "lora_B", "magnitude")
    )


def test_modules_that_are_trained_whole_are_switched_too():
    model = base(torch.bfloat16)
    doratune.attach(model, doratune.AdapterConfig(rank=2, targets=["up"], also_train=["mix"]), name="a")
    with torch.no_grad():
        model.mix.weight.add_(0.5)
    weight, changed = model.mix.weight, out(model)
    doratune.attach(model, doratune.AdapterConfig(**SETTINGS["b"]), name="b")
    assert torch.equal(out(model), out(base(torch.bfloat16)))
    assert torch.equal(out(doratune.use(model, "a")), changed)
    assert model.mix.weight is weight and weight.dtype == torch.float32 and weight.requires_grad
    assert torch.equal(out(doratune.use(model, None)), out(base(torch.bfloat16)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_all_adapters(copied):
    model = attached("a", "b")
    twin = copied(model)
    for name in ("a", "b"):
        assert torch.equal(out(doratune.use(twin, name)), out(doratune.use(model, name)))
    with torch.no_grad():
        twin.up.lora_B.add_(1.0)
        twin.up.weight.add_(1.0)
    assert torch.equal(out(doratune.use(model, "b")), out(alone("b", 1)))


def test_adapters_follow_the_model_to_another_dtype():
    model = attached("a", "b").to(torch.float64)
    want = attached("a", "b").to(torch.float64)
    assert off(out(doratune.use(model, "a")), out(alone("a", 0).double())) < 1e-12
    assert model.up.lora_A.dtype == torch.float64
    assert off(out(doratune.use(model, "b")), out(want)) < 1e-12


def test_an_adapter_costs_its_own_numbers_only():
    model = attached("a")
    before = sum(t.numel() for t in tensors(model))
    doratune.attach(model, doratune.AdapterConfig(**SETTINGS["b"]), name="b")
    own = sum(
        p.numel() for _, layer in doratune.adapters(model) for n, p in layer.named_parameters() if n not in ("weight", "bias")
    )
    derived = 4 * sum(sum(layer.weight.shape) for _, layer in doratune.adapters(model))  # norms and prepared factors
    assert sum(t.numel() for t in tensors(model)) - before <= 3 * own + derived


def tensors(model):
    """Every tensor that a pickle of the model would hold, once."""
    held = {}

    class Collector(pickle.Pickler):
        def persistent_id(self, value):
            if isinstance(value, torch.Tensor):
                held[value.data_ptr()] = value
            return None

    import io

    Collector(io.BytesIO()).dump(model)
    return held.values()


def test_disabled_is_the_base_bit_for_bit_and_nests():
    model = attached("a", "conv")
    adapted = out(model)
    with doratune.disabled(model):
        assert torch.equal(out(model), out(base()))
        with doratune.disabled(model):
            assert torch.equal(out(model), out(base()))
        assert torch.equal(out(model), out(base()))
    assert torch.equal(out(model), adapted)
    assert "forward" not in vars(model.up)
    with doratune.disabled(doratune.use(model, None)):
        assert torch.equal(out(model), out(base()))


def test_disabled_comes_back_after_an_error():
    model = attached("a")
    adapted = out(model)
    with pytest.raises(RuntimeError), doratune.disabled(model):
        raise RuntimeError
    assert torch.equal(out(model), adapted)


def test_threads_do_not_disturb_each_other():
    model, plain = attached("a", "conv"), out(base())
    adapted, wrong, start = out(model), [], threading.Barrier(4)

    def run(off_here):
        start.wait()
        for _ in range(30):
            if off_here:
                with doratune.disabled(model):
                    wrong.append(torch.equal(out(model), plain))
            else:
                wrong.append(torch.equal(out(model), adapted))

    threads = [threading.Thread(target=run, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 120 and all(wrong)
    assert "forward" not in vars(model.up)


def test_disabled_under_compile():
    model = attached("a")
    want, plain = out(model), out(base())
    compiled = torch.compile(model, backend="eager")
    assert off(out(compiled), want) < 1e-5
    with doratune.disabled(model):
        assert torch.equal(out(compiled), plain)
    assert off(out(compiled), want) < 1e-5


def test_disabled_experts_and_attention():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=3, num_experts_per_tok=2, experts_implementation="eager",
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        plain = model(ids).logits
        doratune.attach(model, doratune.AdapterConfig(rank=2, targets="all-layers"))
        adapted = randomize(model)(ids).logits
        with doratune.disabled(model):
            assert torch.equal(model(ids).logits, plain)
        assert torch.equal(model(ids).logits, adapted) and not torch.equal(adapted, plain)
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    before = attention(x, x, x)[0]
    model = torch.nn.ModuleDict({"inner": attention})
    doratune.attach(model, doratune.AdapterConfig(rank=2, targets=["inner"]))
    randomize(model)
    with doratune.disabled(model):
        assert off(attention(x, x, x)[0], before) < 1e-6
    assert off(attention(x, x, x)[0], before) > 1e-3


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_is_the_rule_of_one_norm(axis, dtype):
    """V = W + Σ t·ΔV, m = w + Σ t·(m − w), and LoRA outside the norm: worked out densely in float64."""
    from reference import along, row_norm

    model = attached("a", "b", "lora", dtype=dtype, magnitude_axis=axis)
    t = {"a": 0.7, "b": 0.5, "lora": -0.4}
    W = dense.base_weights(base(dtype))
    V, m, outside = dict(W), {name: row_norm(weight, axis) for name, weight in W.items()}, {name: 0.0 for name in W}
    for name, weight in t.items():
        own = dense.leaves(doratune.use(model, name))
        for layer, module in doratune.adapters(model):
            step = weight * dense.update(own[layer], module).detach()
            if dense.magnitude(own[layer]) is None:
                outside[layer] = outside[layer] + step
            else:
                V[layer] = V[layer] + step
                m[layer] = m[layer] + weight * (dense.magnitude(own[layer]).detach() - row_norm(W[layer], axis))
    merged = {
        name: V[name] * (m[name] / row_norm(V[name], axis)).unsqueeze(along(axis)) + outside[name]
        if name in ("up", "mix", "down")
        else W[name]
        for name in W
    }
    want = dense.forward(merged, dense.biases_of(base(dtype)), IDS)
    floor = 0.03 if dtype == torch.bfloat16 else 2e-6
    assert off(out(doratune.combine(model, t, "sum")), want) < floor
    assert doratune.names(model)[0] == "sum"
    backwards = doratune.combine(model, dict(reversed(t.items())), "backwards")
    assert off(out(backwards), want) < floor
    doratune.merge(backwards)
    assert off(out(backwards), want) < floor


@pytest.mark.parametrize("name", sorted(SETTINGS))
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 1.5, -0.5])
def test_strength_is_the_line_from_the_base(name, t):
    model = attached(name)
    W = dense.base_weights(base())
    full = copy.deepcopy(model)
    doratune.merge(full, keep="none")
    line = {layer: W[layer] + t * (weight - W[layer]) for layer, weight in dense.base_weights(full).items()}
    doratune.strength(model, name, t, "part")
    assert off(out(model), dense.forward(line, dense.biases_of(base()), IDS)) < 5e-6
    if t == 0:
        assert torch.equal(out(model), out(base()))


def test_a_sum_of_nothing_is_the_base_and_can_be_trained_and_saved(tmp_path):
    model = attached("a", "b", "lora")
    doratune.combine(model, {"a": 0, "b": 0.0, "lora": 0}, "zero")
    assert torch.equal(out(model), out(base()))
    doratune.combine(model, {"a": 1, "lora": 0.5}, "both")
    optimizer = torch.optim.AdamW(doratune.parameter_groups(model, lr=0.05))
    model(IDS).square().mean().backward()
    optimizer.step()
    doratune.save(model, tmp_path / "both")
    fresh = base()
    doratune.load(fresh, tmp_path / "both", name="loaded")
    assert off(out(fresh), out(model)) < 1e-6
    assert doratune.names(fresh) == ["loaded"]


def test_mixed_batches_equal_single_runs():
    model = attached("a", "b", "lora", "conv")
    chosen = ["a", None, "lora", "b", "a", "conv"]
    with doratune.mixed(model, chosen):
        got = out(model)
    for i, name in enumerate(chosen):
        want = out(doratune.use(model, name), IDS[i : i + 1])
        assert off(got[i : i + 1], want) < 1e-6, name
    doratune.use(model, None)
    with doratune.mixed(model, chosen):
        assert off(out(model), got) < 1e-6


def test_mixed_generation():
    model = tiny_llama()
    for seed, name in enumerate(("x", "y")):
        doratune.attach(model, doratune.AdapterConfig(rank=4, targets=["q_proj", "v_proj", "down_proj"][seed:]), name=name)
        randomize(model, seed, 0.5)
    prompts, chosen = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]]), ["y", None, "x"]
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with doratune.mixed(model, chosen):
        got = model.generate(prompts, **settings)
    for i, name in enumerate(chosen):
        alone = doratune.use(model, name).generate(prompts[i : i + 1], **settings)
        assert torch.equal(got[i, : alone.shape[1]], alone[0])


def test_mixed_gradients_reach_each_adapter():
    model = attached("a", "b")
    with doratune.mixed(model, ["a", "b", None, "a", "b", "a"]):
        model(IDS).square().sum().backward()
    both = {name: model.up.lora_A.grad.clone() for name in ("b",)}
    model.zero_grad()
    model(IDS[[1, 4]]).square().sum().backward()
    assert off(both["b"], model.up.lora_A.grad) < 1e-5


SMALL = doratune.AdapterConfig(rank=2)
WRONG = {
    "an unknown name": (lambda m: doratune.use(m, "aa"), "no adapter 'aa'; it has 'b', 'a'"),
    "a name twice": (lambda m: doratune.attach(m, SMALL, name="a"), "'a' is set aside already"),
    "the name in use": (lambda m: doratune.attach(m, SMALL, name="b"), "attached already, with an adapter 'b'"),
    "no name": (lambda m: doratune.attach(m, name="a/b"), "name is 'a/b'"),
    "a weight that is no number": (lambda m: doratune.combine(m, {"a": "1"}, "c"), "the weight of 'a' is '1'"),
    "no weights": (lambda m: doratune.combine(m, {}, "c"), "expected a mapping"),
    "a name that is taken": (lambda m: doratune.combine(m, {"a": 1}, "b"), "'b'"),
    "deleting nothing": (lambda m: doratune.delete(m, "c"), "no adapter 'c'"),
    "an unknown name in a batch": (lambda m: doratune.mixed(m, ["a", "z"]).__enter__(), "no adapter 'z'"),
    "an empty batch": (lambda m: doratune.mixed(m, []).__enter__(), "chosen is empty"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_said_and_changes_nothing(case):
    act, words = WRONG[case]
    model = attached("a", "b")
    before = out(model)
    with pytest.raises(UserError, match=words):
        act(model)
    assert doratune.names(model) == ["b", "a"]
    assert torch.equal(out(model), before)


def test_a_batch_of_another_size_is_refused():
    model = attached("a", "b")
    with doratune.mixed(model, ["a", "b"]), pytest.raises(UserError, match="the batch has 6 examples, chosen names 2"):
        out(model)


def test_a_failed_attach_leaves_the_one_in_use():
    model = attached("a")
    before = out(model)
    with pytest.raises(UserError, match="matches no module"):
        doratune.attach(model, doratune.AdapterConfig(targets=["nothing"]), name="b")
    assert torch.equal(out(model), before) and doratune.names(model) == ["a"]


def test_axes_that_differ_are_refused():
    model = attached("a")
    doratune.attach(model, doratune.AdapterConfig(**SETTINGS["b"] | {"magnitude_axis": "input"}), name="b")
    with pytest.raises(UserError, match="magnitude_axis of these adapters is input and output"):
        doratune.combine(model, {"a": 1, "b": 1}, "c")


def test_merged_models_are_refused():
    model = attached("a", "b")
    doratune.merge(model)
    for act in (
        lambda: doratune.use(model, "a"),
        lambda: doratune.attach(model, name="c"),
        lambda: doratune.disabled(model).__enter__(),
    ):
        with pytest.raises(UserError, match="merged"):
            act()
