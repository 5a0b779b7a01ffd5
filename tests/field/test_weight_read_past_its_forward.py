"""A parent that hands a layer's raw weight to a function: the layer never runs and an adapter there does nothing. Running the model
finds it out, whatever the class; `verify` and the first training step name the layers."""

import ctypes
import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import doratune
from doratune import AdapterConfig
from doratune.errors import UserError


class Functional(nn.Module):
    """F.linear over the weights of its layers."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return F.linear(F.linear(x, self.up.weight, self.up.bias), self.down.weight, self.down.bias)


class Transposed(nn.Module):
    """A product with a view of the weight."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return x @ self.proj.weight.T


class Packed(nn.Module):
    """Three layers in one product."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6, bias=False) for _ in range(3))

    def forward(self, x):
        return (x @ torch.cat([self.q.weight, self.k.weight, self.v.weight]).mT)[..., :6]


class TiedUse(nn.Module):
    """A layer that runs, and whose weight is used once more."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return F.linear(self.proj(x), self.proj.weight)


class Unseen(nn.Module):
    """What takes the weight is no torch function: a kernel over its memory."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return Kernel.apply(x, self.proj.weight)


class Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        memory = (ctypes.c_float * weight.numel()).from_address(weight.data_ptr())
        return torch.from_numpy(x.detach().numpy() @ np.ctypeslib.as_array(memory).reshape(weight.shape).T)

    @staticmethod
    def backward(ctx, dy):
        return dy, None


class Model(nn.Module):
    """Layers as they should be, around one of the above."""

    def __init__(self, inner):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 6), inner, nn.Linear(6, 2)

    def forward(self, x):
        return self.last(self.inner(self.first(x)))


def wavlm():
    from transformers import WavLMConfig, WavLMModel

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return WavLMModel(
        WavLMConfig(conv_dim=(16,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, layerdrop=0.0, **small)
    )


READ = {
    Functional: ("linear", ["inner.up", "inner.down"]),
    Transposed: ("T", ["inner.proj"]),
    Packed: ("cat", ["inner.q", "inner.k", "inner.v"]),
    TiedUse: ("linear", ["inner.proj"]),
}


@pytest.mark.parametrize("inner", READ, ids=lambda c: c.__name__)
def test_verify_names_the_layer_and_the_function(inner):
    function, names = READ[inner]
    model = Model(inner())
    doratune.attach(model, AdapterConfig(rank=2))
    report = doratune.verify(model, torch.randn(3, 4))
    assert not report.ok
    assert sorted(report.bypassed) == sorted(names)
    assert all(f"read by {function}" in reason for reason in report.bypassed.values())


def test_verify_sees_a_layer_that_a_kernel_passes_by():
    model = Model(Unseen())
    doratune.attach(model, AdapterConfig(rank=2))
    report = doratune.verify(model, torch.randn(3, 4))
    assert list(report.bypassed) == ["inner.proj"]
    assert "inner.proj: is passed by" in str(report)


def test_wavlm_without_an_example():
    model = wavlm()
    doratune.attach(model, AdapterConfig(rank=2))
    report = doratune.verify(model)
    assert not report.ok
    assert report.ran
    assert len(report.bypassed) == 8
    assert all("multi_head_attention_forward" in reason for reason in report.bypassed.values())
    doratune.detach(model)
    names = [name.rpartition(".")[2] for name in report.bypassed]
    doratune.attach(model, AdapterConfig(rank=2, exclude=sorted(set(names))))
    assert doratune.verify(model).bypassed == {}


def test_verify_says_what_was_not_run():
    """A model of one's own has no config: nothing is claimed of its running."""
    model = Model(Functional())
    doratune.attach(model, AdapterConfig(rank=2))
    report = doratune.verify(model)
    assert report.ok
    assert not report.ran
    assert "running was not checked" in str(report)


def test_metadata_is_no_reading():
    """The dtype, the device and the shape of a weight are asked for everywhere."""

    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(6, 6)

        def forward(self, x):
            x = x.to(self.proj.weight.dtype).to(self.proj.weight.device).type_as(self.proj.weight)
            scale = self.proj.weight.new_ones(self.proj.weight.shape[1]) + torch.zeros_like(self.proj.weight)[0]
            return self.proj(x * scale)

    model = Model(Asks())
    doratune.attach(model, AdapterConfig(rank=2))
    assert doratune.verify(model, torch.randn(3, 4)).ok


def trainer(model, tmp_path, steps=12, **settings):
    from transformers import Trainer, TrainingArguments

    from doratune.training import TrainerMixin

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x, labels=None):
            return {"loss": self.net(x).square().mean()}

    class Ours(TrainerMixin, Trainer):
        pass

    wrapped = Wrapped()
    doratune.attach(wrapped, AdapterConfig(rank=2))
    arguments = TrainingArguments(
        tmp_path, max_steps=steps, per_device_train_batch_size=2, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True
    )
    ours = Ours(wrapped, arguments, train_dataset=[{"x": torch.randn(4), "labels": 0} for _ in range(40)])
    for name, value in settings.items():
        setattr(ours, name, value)
    return ours


@pytest.mark.parametrize("inner", [Functional, Transposed, Packed, TiedUse], ids=lambda c: c.__name__)
def test_the_first_step_stops(inner, tmp_path):
    ours = trainer(Model(inner()), tmp_path)
    with pytest.raises(UserError, match=r"do not train, after step 1: .*net\.inner.*idle_layers: warn"):
        ours.train()
    assert ours.state.global_step == 1


def test_told_to_go_on_it_warns(tmp_path, caplog):
    trainer(Model(Functional()), tmp_path, idle_layers="warn").train()
    assert "net.inner.up" in caplog.text
    assert "read by linear" in caplog.text


class Branches(nn.Module):
    """A branch that no input reaches."""

    def __init__(self):
        super().__init__()
        self.used, self.other = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6))

    def forward(self, x):
        return self.used(x) if x.dim() == 2 else self.other(x)


class Unused(nn.Module):
    """An output that the loss does not see."""

    def __init__(self):
        super().__init__()
        self.used, self.pooler = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        self.pooler(x)
        return self.used(x)


@pytest.mark.parametrize(
    ("inner", "name", "why"),
    [
        (Branches, "inner.other.0", "it does not run"),
        (Unused, "inner.pooler", "no gradient reaches it"),
        (Unseen, "inner.proj", "it does not run, the module around it does"),
    ],
    ids=["branch", "unused", "kernel"],
)
def test_what_may_yet_come_has_ten_steps(inner, name, why, tmp_path):
    ours = trainer(Model(inner()), tmp_path)
    with pytest.raises(UserError, match=rf"after step 10: net\.{name} \({why}\)"):
        ours.train()


class Experts(nn.Module):
    """Experts in a list, of which each batch takes one."""

    def __init__(self, usual=3):
        super().__init__()
        self.experts, self.calls = nn.ModuleList(nn.Linear(6, 6) for _ in range(usual + 1)), 0
        self.usual = usual

    def forward(self, x):
        self.calls += 1
        return self.experts[self.calls % self.usual](x)


def test_an_expert_without_tokens_is_named_and_stops_nothing(tmp_path, caplog):
    trainer(Model(Experts()), tmp_path, steps=12).train()
    assert "do not train" not in caplog.text
    assert "not reached in 10 steps, while others of their list had gradients: net.inner.experts.3" in caplog.text


def test_a_short_run_ends_with_what_was_idle(tmp_path, caplog):
    trainer(Model(Branches()), tmp_path, steps=3).train()
    assert "after step 3: net.inner.other.0 (it does not run)" in caplog.text


def test_accumulation_and_checkpointing_are_not_idle(tmp_path):
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(6, 6)

        def forward(self, x):
            return checkpoint(self.proj, x, use_reentrant=False)

    ours = trainer(Model(Checkpointed()), tmp_path)
    ours.args.gradient_accumulation_steps = 2
    assert ours.train().global_step == 12


def past_its_forward(model):
    """A language model with one layer whose weight its parent reads."""

    class Mlp(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

        def forward(self, x):
            return F.linear(F.silu(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)

    model.model.layers[1].mlp = Mlp(model.model.layers[1].mlp)
    return model


@pytest.mark.parametrize("policy", ["stop", "warn"])
def test_a_run_of_doratune_train(policy, tiny_folder, tiny_tokenizer, tmp_path):
    from conftest import tiny_llama

    from doratune.training.recipe import TrainRecipe
    from doratune.training.train import train

    data = [{"instruction": f"Is {i} even?", "input": "", "output": "true"} for i in range(8)]
    (tmp_path / "data.json").write_text(json.dumps(data))
    recipe = TrainRecipe(
        model=str(tiny_folder), data=str(tmp_path / "data.json"), output=str(tmp_path / "run"), rank=2, batch_size=4, max_steps=2,
        dtype="float32", idle_layers=policy, tensorboard=False,
    )  # fmt: skip
    said = []
    arguments = {"say": said.append, "model": past_its_forward(tiny_llama()), "tokenizer": tiny_tokenizer}
    if policy == "stop":
        with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.down_proj has its weight read by linear; leave them out"):
            train(recipe, **arguments)
        assert not (tmp_path / "run").exists()
    else:
        train(recipe, **arguments)
        assert any("down_proj: has its weight read by linear" in line for line in said)
        assert (tmp_path / "run" / "adapter").is_dir()
