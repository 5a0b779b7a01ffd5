"""Sums in any order, trained, evaluated and merged; `disabled` and t = 0 bit for bit under torch.compile and in threads."""

import itertools
import threading

import pytest
import torch
from test_several import IDS, attached, base, off, out

import doratune


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("names", [("a", "b"), ("a", "lora"), ("lora", "vera"), ("a", "b", "lora")], ids="+".join)
def test_any_order_is_the_same_in_training_evaluation_and_merged(names, axis):
    """In whatever order they were used before and are named; the magnitude's gradients included."""
    results = []
    for named_order in itertools.permutations(names):
        model = attached(*names, magnitude_axis=axis)
        for name in reversed(named_order):
            doratune.use(model, name)
        t = {name: 0.3 + 0.2 * names.index(name) for name in named_order}
        doratune.combine(model, t, "sum")
        model.train()
        trained = model(IDS)
        trained.square().mean().backward()
        by_magnitude = {n: layer.magnitude.grad for n, layer in doratune.adapters(model) if layer.magnitude is not None}
        doratune.merge(model.eval())
        merged = out(model)
        doratune.unmerge(model)
        results.append((trained.detach(), out(model), merged, *(by_magnitude[n] for n in sorted(by_magnitude))))
    first = results[0]
    for other in results[1:]:
        assert all(off(mine, theirs) < 1e-6 for mine, theirs in zip(other, first, strict=True))
    assert off(first[0], first[1]) < 1e-6 and off(first[2], first[1]) < 2e-6
    assert off(out(base()), first[1]) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_disabled_under_compile_is_the_compiled_base_bit_for_bit(backend, dtype):
    torch.compiler.reset()
    plain = out(torch.compile(base(dtype), backend=backend))
    model = attached("a", "lora", dtype=dtype)
    adapted = torch.compile(model, backend=backend)
    want = out(adapted)
    for _ in range(2):
        with doratune.disabled(model):
            assert torch.equal(out(adapted), plain)
            with doratune.disabled(model):
                assert torch.equal(out(adapted), plain)
        assert torch.equal(out(adapted), want)
    assert off(want, plain) > 1e-3


@pytest.mark.parametrize("how", ["strength", "combine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_t_0_under_compile_is_the_base_bit_for_bit(backend, dtype, how):
    torch.compiler.reset()
    model = attached("a", "b", dtype=dtype)
    doratune.strength(model, "a", 0.0, "zero") if how == "strength" else doratune.combine(model, {"a": 0, "b": 0}, "zero")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert torch.equal(out(compiled), out(torch.compile(base(dtype), backend=backend)))
    trained = compiled.train()(IDS)
    assert torch.equal(trained, out(base(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_gives_its_own_base_bit_for_bit(dtype):
    """`disabled` and t = 0, in evaluation and training. Kernels that are generated anew round the adapter otherwise."""
    torch.compiler.reset()
    plain = torch.compile(base(dtype))
    expected, expected_in_training = out(plain), plain.train()(IDS)
    model = attached("a", "lora", dtype=dtype)
    adapted = torch.compile(model)
    want = out(adapted)
    with doratune.disabled(model):
        assert torch.equal(out(adapted), expected)
    assert off(out(adapted), want) < (1e-6 if dtype == torch.float32 else 8e-3) < off(want, expected)
    doratune.combine(model, {"a": 0, "lora": 0}, "zero")
    assert torch.equal(out(adapted), expected)
    assert torch.equal(adapted.train()(IDS), expected_in_training)


def in_threads(runs, rounds=20):
    """Each function over and over, all at once; what they returned."""
    start, results, errors = threading.Barrier(len(runs)), [], []

    def work(run):
        try:
            start.wait()
            results.extend(run() for _ in range(rounds))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    return results


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_threads_with_and_without_the_adapter_at_once(backend):
    torch.compiler.reset()
    model = attached("a", "conv")
    called = torch.compile(model, backend=backend) if backend else model
    want = out(called)
    with doratune.disabled(model):
        plain = out(called)
    assert torch.equal(plain, out(torch.compile(base(), backend=backend) if backend else base()))

    def off_here():
        with doratune.disabled(model):
            return torch.equal(out(called), plain)

    results = in_threads([off_here, lambda: torch.equal(out(called), want)] * 2)
    assert len(results) == 80 and all(results)


@pytest.mark.parametrize("how", ["strength", "combine"])
def test_t_0_in_threads(how):
    model = attached("a", "b")
    doratune.strength(model, "b", 0.0, "zero") if how == "strength" else doratune.combine(model, {"a": 0, "b": 0}, "zero")
    plain = out(base())

    def under_disabled():
        with doratune.disabled(model):
            return torch.equal(out(model), plain)

    results = in_threads([lambda: torch.equal(out(model), plain), under_disabled] * 2)
    assert len(results) == 80 and all(results)
