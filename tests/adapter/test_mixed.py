"""An adapter for each example of a batch: every kind of layer and adapter, other batches in one block, threads, edits meanwhile."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import randomize, tiny_gpt2, tiny_llama
from test_several import IDS, SETTINGS, attached, off, out

import doratune
from doratune.errors import UserError

CHOSEN = ["a", None, "lora", "b", "a", "conv"]


def singles(model, chosen):
    """Each example alone through its adapter."""
    return torch.cat([out(doratune.use(model, name), IDS[i : i + 1]) for i, name in enumerate(chosen)])


@pytest.mark.parametrize(
    ("dtype", "axis", "floor"),
    [
        (torch.float32, "output", 1e-6),
        (torch.float32, "input", 1e-6),
        (torch.bfloat16, "output", 0.03),
        (torch.float64, "output", 1e-14),
    ],
)
def test_every_adapter_in_one_batch(dtype, axis, floor):
    names = [name for name in SETTINGS if axis == "output" or name != "conv"]  # a convolution has no magnitude on its input
    model = attached(*names, dtype=dtype, magnitude_axis=axis)
    for chosen in ([*names, None][:6], [*names, None, "a"][-6:], [None] * 6, ["vera"] * 6, ["m", "m", None, None, "m", "b"]):
        want = singles(model, chosen)
        for in_use in ("b", None):
            doratune.use(model, in_use)
            with doratune.mixed(model, chosen):
                assert off(out(model), want) < floor, (chosen, in_use)


def test_a_block_goes_on_with_other_batches():
    model = attached("a", "b", "lora", "conv")
    batches = [CHOSEN, ["b", "b", "a", None, "conv", "lora"], ["lora"] * 6, ["a", None, "b", None, "a", "conv"]]
    want = [singles(model, chosen) for chosen in batches]
    two = singles(model, ["a", "b"])
    with doratune.mixed(model, CHOSEN) as way:
        assert off(out(model), want[0]) < 1e-6
        for chosen, expected in zip(batches, want, strict=True):
            way.choose(chosen)
            assert off(out(model), expected) < 1e-6
        way.choose(["a", "b"])
        assert off(out(model, IDS[:2]), two) < 1e-6
        with pytest.raises(UserError, match="the batch has 6 examples, chosen names 2"):
            out(model)
        with pytest.raises(UserError, match="chosen names 'vera'; this block was entered with a, b, conv, lora"):
            way.choose(["vera"])
    assert "forward" not in vars(model.up)


def test_the_bases_product_is_made_once():
    """Counted in operations: a linear layer of eight adapters has one product with W."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        def __init__(self, columns):
            super().__init__()
            self.columns, self.count = columns, 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            shapes = [tuple(a.shape) for a in args if torch.is_tensor(a)]
            self.count += any(shape in ((32, 48), (48, 32)) for shape in shapes) and "mm" in str(function)
            return function(*args, **(kwargs or {}))

    model = tiny_llama(layers=1)
    names = [f"n{i}" for i in range(8)]
    for seed, name in enumerate(names):
        doratune.attach(model, doratune.AdapterConfig(rank=2, targets=["up_proj", "down_proj"]), name=name)
        randomize(model, seed)
    ids = torch.arange(3, 11)[:, None]
    with torch.no_grad(), doratune.mixed(model, names):
        model(ids)  # prepares the factors
        with Products(names) as seen:
            model(ids)
    assert seen.count == 3  # gate, up, down


@pytest.fixture
def interrupted():
    """New threads give way to others again and again, in the middle of this package's functions."""
    package, chance = str(Path(doratune.__file__).parent), random.Random(0)

    def trace(frame, event, argument):
        if not frame.f_code.co_filename.startswith(package):
            return None
        if chance.random() < 0.02:
            time.sleep(1e-5)
        return trace

    before = threading.gettrace()
    threading.settrace(trace)
    yield
    threading.settrace(before)


def side_by_side(*jobs, times=8):
    """The results of each job, done so many times in a thread of its own."""
    start = threading.Barrier(len(jobs))

    def run(job):
        start.wait()
        return [job() for _ in range(times)]

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(run, jobs))


@pytest.mark.parametrize("attempt", range(12))
def test_threads_with_batches_of_their_own(interrupted, attempt):
    model = attached("a", "b", "lora")
    batches = [["a", None, "lora", "b", "a", "b"], ["b"] * 6, ["lora", "lora", None, "a", "b", None]]
    want = [singles(model, chosen) for chosen in batches]
    doratune.use(model, "a")

    def job(i):
        with doratune.mixed(model, batches[i]):
            return off(out(model), want[i])

    assert max(map(max, side_by_side(*(lambda i=i: job(i) for i in range(3))))) < 1e-6


@pytest.mark.parametrize("attempt", range(6))
def test_threads_of_every_sort(interrupted, attempt):
    """Blocks of two sorts, plain calls and a call that trains, at once."""
    model = attached("a", "b", "lora")
    want = singles(model, ["a", None, "lora", "b", "a", "b"])
    doratune.use(model, "a")
    plain = out(model)
    with doratune.disabled(model):
        base = out(model)
    parameters = [p.requires_grad_() for name, p in model.named_parameters() if ".lora_" in name or "magnitude" in name]

    def mixed():
        with doratune.mixed(model, ["a", None, "lora", "b", "a", "b"]):
            return off(out(model), want)

    def mixed_with_gradients():
        with doratune.mixed(model, ["b"] * 6):
            return model(IDS).isnan().any().item()

    def disabled():
        with doratune.disabled(model):
            return off(out(model), base)

    def training():
        y = model(IDS)
        torch.autograd.grad(y.sum(), parameters, allow_unused=True)
        return off(y.detach(), plain)

    jobs = mixed, mixed_with_gradients, disabled, training, lambda: off(out(model), plain)
    assert max(map(max, side_by_side(*jobs))) < 1e-6


def test_threads_that_all_meet_an_edit(interrupted):
    """Whoever comes first prepares the factors anew, and nobody computes with old ones."""
    model = attached("a", "b")
    layers = [layer for _, layer in doratune.adapters(model)]
    for attempt in range(12):
        with torch.no_grad():
            for layer in layers:
                layer.lora_B.data = layer.lora_B.data + 0.1 * (attempt + 1)
        answers = side_by_side(*[lambda: out(model)] * 4, times=1)
        for layer in layers:
            doratune.refresh(layer)
        want = out(model)
        assert all(off(answer, want) < 1e-6 for (answer,) in answers), attempt


@pytest.mark.parametrize("edit", ["optimizer", "in place", "data"])
def test_edits_within_a_block_are_seen(edit):
    model = attached("a", "b")
    layer = dict(doratune.adapters(doratune.use(model, "a")))["up"]
    B = layer.lora_B
    doratune.use(model, "b")
    ids = torch.randint(10, (6, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), doratune.mixed(model, ["a", "b"] * 3):
        before = out(model, ids)
        if edit == "optimizer":
            B.grad = torch.ones_like(B)
            torch.optim.SGD([B], lr=0.1).step()
        elif edit == "in place":
            B.sub_(0.1)
        else:
            B.data = B.data - 0.1
        after = out(model, ids)
    want = out(doratune.use(model, "a"), ids)
    assert off(after[0::2], want[0::2]) < 1e-6 < 1e-3 < off(before[0::2], want[0::2])
    assert torch.equal(after[1::2], before[1::2])


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_generation_with_left_padding(make):
    """Prompts of different lengths, cached keys and values, eight adapters and the base: each as alone."""
    model = make()
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"] if make is tiny_llama else ["c_attn", "c_fc"]
    names = [f"n{i}" for i in range(8)]
    for seed, name in enumerate(names):
        doratune.attach(model, doratune.AdapterConfig(rank=4, targets=targets), name=name)
        randomize(model, seed, 0.5)
    chosen, settings = [*names, None], {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    rows = [torch.arange(3, 6 + i) for i in range(9)]
    ids = torch.stack([torch.cat([torch.zeros(11 - len(row), dtype=torch.long), row]) for row in rows])
    with doratune.mixed(model, chosen):
        got = model.generate(ids, attention_mask=(ids > 0).long(), **settings)
    for i, name in enumerate(chosen):
        alone = doratune.use(model, name).generate(rows[i][None], attention_mask=torch.ones(1, len(rows[i])).long(), **settings)
        new = alone[0, len(rows[i]) :]
        assert torch.equal(got[i, 11 : 11 + len(new)], new), name
