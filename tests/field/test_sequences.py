"""Random sequences of what users do to a model, each step held against the dense float64 twin (`dense.py`).

    attach, train, hand edits, eval, merge, unmerge, save, load, detach, deepcopy, pickle, state dicts, dtype changes

over all methods, axes, starts, gradients and dtypes. `DORATUNE_SEQUENCES=1000` runs so many; a failure names its seed, and
`DORATUNE_SEQUENCE=seed` runs that one alone.
"""

import copy
import os
import pickle
import random

import dense
import pytest
import torch

import doratune
from doratune.config import METHODS

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 0.06, torch.float16: 0.01}
STEPS = 8


def some_config(draw):
    """A configuration that the mixed model takes."""
    method = draw.choice(sorted(METHODS))
    with_magnitude = METHODS[method][1]
    config = {"method": method, "rank": draw.choice([1, 2, 3]), "alpha": draw.choice([1.0, 4.0]), "seed": draw.randrange(99)}
    config["targets"] = draw.choice(["all-layers", "all-linear", ["up", "down"], ["embed", "mix"]])
    if method.endswith("vera") and "embed" in config["targets"]:
        config["targets"] = ["mix"]
    if method in ("lora", "dora"):
        config["start"] = draw.choice(["zero", "zero", "pissa", "olora"])
        config["rank_scaling"] = draw.choice(["standard", "rslora"])
        config["rank_overrides"] = {"down": 4} if config["targets"] == ["up", "down"] else {}
    if with_magnitude:
        config["magnitude_axis"] = draw.choice(["output", "input"])
        config["embedding_magnitude"] = draw.choice(["token", "dimension"])
        config["norm_gradient"] = draw.choice(["detached", "full"])
        config["magnitude_form"] = draw.choice(["direct", "relative"])
        if config["targets"] == ["up", "down"] and draw.random() < 0.5:
            config["magnitude_only"] = ["mix"]
    return doratune.AdapterConfig(**config)


class Walk:
    """One model on its way: what it should compute is known at each step from `W`, `biases` and its parameters."""

    def __init__(self, seed, folder):
        self.draw, self.folder, self.trail = random.Random(seed), folder, []
        torch.manual_seed(seed)
        self.dtype = self.draw.choice(list(TOLERANCE))
        self.model = self.zero_rows(dense.Mixed()).to(self.dtype)
        self.remember_base()
        self.ids = torch.randint(dense.TOKENS, (3, 5))
        self.frozen, self.rounded_to = None, []  # the merged weights and the dtypes that they went through, while merged
        self.attach()

    def zero_rows(self, model):
        with torch.no_grad():
            if self.draw.random() < 0.4:
                model.up.weight[3] = 0
            if self.draw.random() < 0.2:
                model.embed.weight[0] = 0
        return model

    def remember_base(self):
        self.W, self.biases = dense.base_weights(self.model), dense.biases_of(self.model)

    @property
    def merged(self):
        return self.frozen is not None

    def expected(self):
        with torch.no_grad():
            weights = self.frozen or dense.effective(self.model, self.config, self.W, dense.leaves(self.model))
            return dense.forward(weights, self.biases, self.ids)

    def run(self, steps=STEPS):
        for _ in range(steps):
            action = self.draw.choice(self.possible())
            self.trail.append(action)
            getattr(self, action)()
            self.check()

    def possible(self):
        both = ["save_and_load", "deep_copy", "pickled", "change_dtype", "evaluate"]
        if self.merged:
            return [*both, "unmerge", "unmerge"]
        return [*both, "train", "train", "edit", "merge", "state_dict", "detach", "no_gradients"]

    def check(self):
        want = self.expected()
        with torch.no_grad():
            self.close(self.model(self.ids), want)
        self.close(self.model(self.ids), want)

    def close(self, got, want, factor=1.0):
        off = ((got.detach().double() - want).norm() / want.norm().clamp_min(1e-12)).item()
        tolerance = max(TOLERANCE[dtype] for dtype in (self.dtype, *self.rounded_to))
        assert off <= factor * tolerance, f"{off:.2g} off in {self.dtype}"  # also where it is NaN

    # What users do

    def attach(self):
        before = self.model(self.ids)
        self.config = some_config(self.draw)
        doratune.attach(self.model, self.config)
        assert torch.equal(self.model(self.ids), before), "the start is not the base"
        self.check()

    def train(self):
        self.model.train()
        optimizer = torch.optim.AdamW(doratune.parameter_groups(self.model, lr=0.02))
        for step in range(self.draw.randint(1, 3)):
            if step == 0:
                self.check_gradients()
            optimizer.zero_grad()
            self.model(self.ids).float().square().mean().backward()
            optimizer.step()
        optimizer.zero_grad()
        self.model.eval()

    def check_gradients(self):
        own = dense.leaves(self.model)
        y = dense.forward(dense.effective(self.model, self.config, self.W, own), self.biases, self.ids)
        dY = torch.linspace(-1, 1, y.numel()).view(y.shape)
        y.backward(dY.double())
        self.model.zero_grad()
        self.model(self.ids).backward(dY.to(self.dtype))
        want = [p.grad for ps in own.values() for p in ps.values() if p.requires_grad]
        layers = dict(doratune.adapters(self.model))
        got = [getattr(layers[name], key).grad for name, ps in own.items() for key, p in ps.items() if p.requires_grad]
        pairs = [(g, w) for g, w in zip(got, want, strict=True) if g is not None or (w is not None and w.any())]
        self.close(torch.cat([g.flatten() for g, _ in pairs]), torch.cat([w.flatten() for _, w in pairs]), factor=3)

    @torch.no_grad()
    def edit(self):
        """A hand edit of single numbers, through `.data` half the time."""
        for _, layer in doratune.adapters(self.model):
            for name, p in layer.named_parameters(recurse=False):
                if p.requires_grad:
                    target = p.data if self.draw.random() < 0.5 else p
                    target.mul_(1.1) if name.startswith("magnitude") else target.add_(0.1)

    def merge(self):
        with torch.no_grad():
            self.frozen = dense.effective(self.model, self.config, self.W, dense.leaves(self.model))
        self.before_merge = self.model(self.ids).detach()
        self.merged_in, self.rounded_to = self.dtype, [self.dtype]
        self.set_aside = {name: self.W[name] for name, _ in doratune.adapters(self.model)}
        doratune.merge(self.model, keep=self.draw.choice(["cpu", "device"]))

    def unmerge(self):
        doratune.unmerge(self.model)
        self.frozen, self.rounded_to = None, []
        self.W |= {name: W.to(self.dtype).double() for name, W in self.set_aside.items()}  # they were rounded by no other dtype
        if self.merged_in == self.dtype:
            assert torch.equal(self.model(self.ids), self.before_merge), "unmerge is not bit for bit"

    def save_and_load(self):
        doratune.save(self.model, self.folder)
        fresh = self.base_copy()
        doratune.load(fresh, self.folder, trainable=True)
        before = self.model, self.frozen, self.rounded_to
        self.model, self.frozen, self.rounded_to = fresh, None, []
        self.check()
        if self.draw.random() < 0.5:
            self.model, self.frozen, self.rounded_to = before

    def base_copy(self):
        """The plain base as the test knows it."""
        fresh = dense.Mixed().to(self.dtype)
        with torch.no_grad():
            for name, weight in self.W.items():
                own = getattr(fresh, name).weight
                own.copy_(weight.mT if name == "mix" else weight.view(own.shape))
            for name, bias in self.biases.items():
                getattr(fresh, name).bias.copy_(bias)
        return fresh

    def deep_copy(self):
        self.twin_of(copy.deepcopy(self.model))

    def pickled(self):
        self.twin_of(pickle.loads(pickle.dumps(self.model)))

    def twin_of(self, other):
        """Go on with the copy; what is done to the original must not be seen in it."""
        before, original = other(self.ids), self.model
        with torch.no_grad():
            for p in original.parameters():
                p.add_(1.0)
        assert torch.equal(other(self.ids), before), "the copy follows the original"
        self.model = other

    def change_dtype(self):
        """Merged, what was rounded to the narrower dtype stays so."""
        dtype = self.draw.choice(list(TOLERANCE))
        untouched = not self.merged and self.is_untouched()
        plain = self.base_copy() if not self.merged else None
        self.model.to(dtype)
        self.W = {name: W.to(dtype).double() for name, W in self.W.items()}
        self.biases = {name: b.to(dtype).double() for name, b in self.biases.items()}
        if self.merged:
            self.frozen = {name: W.to(self.dtype).to(dtype).double() for name, W in self.frozen.items()}
            self.rounded_to.append(dtype)
            self.merged_in = self.merged_in if dtype == self.dtype else None
        self.dtype = dtype
        if untouched:
            assert torch.equal(self.model(self.ids), plain.to(dtype)(self.ids)), "the start is not the base after a dtype change"

    def is_untouched(self):
        return torch.equal(self.model(self.ids), self.base_copy()(self.ids))

    def evaluate(self):
        self.model.eval()

    def no_gradients(self):
        for p in self.model.parameters():
            p.grad = None

    def state_dict(self):
        fresh = doratune.attach(self.base_copy(), self.config)
        fresh.load_state_dict(self.model.state_dict())
        self.model = fresh

    def detach(self):
        doratune.detach(self.model)
        for name, W in dense.base_weights(self.model).items():
            assert torch.equal(W, self.W[name]), f"{name} is not the base's weight after detach"
        self.attach()


def walked(seed, folder):
    walk = None
    try:
        walk = Walk(seed, folder)
        walk.run()
    except Exception as error:
        trail = walk and f"{walk.config} {' '.join(walk.trail)}"
        return f"seed {seed}: {type(error).__name__}: {str(error)[:200]} after {trail}"
    return None


def seeds():
    if one := os.environ.get("DORATUNE_SEQUENCE"):
        return [int(one)]
    return range(int(os.environ.get("DORATUNE_SEQUENCES", 30)))


def test_random_sequences(tmp_path):
    wrong = [problem for seed in seeds() if (problem := walked(seed, tmp_path / str(seed)))]
    assert wrong == []


@pytest.mark.parametrize("sabotage", ["magnitude", "lora_B"])
def test_the_twin_sees_a_wrong_number(tmp_path, sabotage):
    """The check fails where one number of the package's is off."""
    walk = Walk(3, tmp_path)
    doratune.detach(walk.model)
    doratune.attach(walk.model, doratune.AdapterConfig(rank=2, targets=["up"]))
    with torch.no_grad():
        want = walk.expected()
        getattr(walk.model.up, sabotage).add_(0.5)
    with pytest.raises(AssertionError):
        walk.close(walk.model(walk.ids), want)
