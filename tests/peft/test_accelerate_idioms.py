"""What PEFT guarantees for a DoRA model holds for an accelerated one: PEFT's own idioms, one test each."""

import copy
import io
import json

import peft
import pytest
import torch
from accelerated import IDS, Around, differ, dora, error, moved, pair, run, ways
from conftest import tiny_llama
from torch import nn

import doratune

TARGETS = ["q_proj", "down_proj"]
CLOSE = 5e-6


@pytest.fixture
def both():
    return pair(tiny_llama(), target_modules=TARGETS)


def config(targets=TARGETS, **settings):
    return peft.LoraConfig(r=2, use_dora=True, init_lora_weights=False, target_modules=targets, **settings)


def add(models, name, settings):
    """The same new adapter on each of the models."""
    for model in models:
        torch.manual_seed(5)
        model.add_adapter(name, settings)


def logits(model, **named):
    with torch.no_grad():
        return model(input_ids=IDS, **named).logits


def on_our_way(model):
    """How many layers the next call takes our way."""
    model(input_ids=IDS)  # takes in what was added
    before = ways(model)
    model(input_ids=IDS)
    return sum(after > earlier for after, earlier in zip(ways(model), before, strict=True))


# Merging


@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unmerge(both, safe):
    for model in both:
        model.merge_adapter(safe_merge=safe)
    assert torch.equal(*map(logits, both))  # PEFT's own merge
    assert on_our_way(both[1]) == 0
    for model in both:
        model.unmerge_adapter()
    assert differ(*both, input_ids=IDS) < CLOSE
    assert on_our_way(both[1]) == 4


@pytest.mark.parametrize("method", ["merge_and_unload", "unload"])
def test_merge_and_unload(both, method):
    before = logits(both[1])
    theirs, ours = (getattr(model, method)() for model in both)
    assert torch.equal(logits(theirs), logits(ours))
    assert [type(module) for module in ours.modules()] == [type(module) for module in theirs.modules()]
    if method == "merge_and_unload":
        assert error(logits(ours), before) < CLOSE
    both[1].base_model = None
    logits(ours)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in ours.modules())
    doratune.attach(ours, doratune.AdapterConfig(rank=2))  # an ordinary model again


def test_disabling_while_merged(both):
    base = logits(tiny_llama())
    for model in both:
        model.merge_adapter()
        with model.disable_adapter():
            assert error(logits(model), base) < CLOSE
    assert differ(*both, input_ids=IDS) < CLOSE


def test_merging_two_adapters_in_turn(both):
    add(both, "two", config())
    for model in both:
        model.merge_adapter(adapter_names=["default", "two"])
    assert torch.equal(*map(logits, both))
    for model in both:
        model.unmerge_adapter()
    assert differ(*both, input_ids=IDS) < 2e-5


# Several adapters


def test_several_active_adapters_go_pefts_way(both):
    add(both, "two", config())
    for model in both:
        model.base_model.set_adapter(["default", "two"])
    assert differ(*both, input_ids=IDS) == 0
    assert on_our_way(both[1]) == 0


def test_several_active_adapters_on_different_layers_go_ours(both):
    add(both, "two", config(["v_proj"]))
    for model in both:
        model.base_model.set_adapter(["default", "two"])
    assert differ(*both, input_ids=IDS) < CLOSE
    assert on_our_way(both[1]) == 6


def test_adapters_that_are_added_later_are_taken_in(both):
    add(both, "two", config(["q_proj", "lm_head"]))
    for model in both:
        model.set_adapter("two")
    assert differ(*both, input_ids=IDS) < CLOSE
    assert on_our_way(both[1]) == 3  # lm_head has no layer of PEFT before
    for model in both:
        model.set_adapter("default")
    assert differ(*both, input_ids=IDS) < CLOSE
    assert on_our_way(both[1]) == 4


def test_a_lora_adapter_beside_it_stays_pefts(both):
    add(both, "plain", peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    for model in both:
        model.set_adapter("plain")
    assert differ(*both, input_ids=IDS) == 0


@pytest.mark.filterwarnings("ignore:Adapter default was active")
def test_deleted_and_made_anew(both):
    for model in both:
        model.add_adapter("other", config(["v_proj"]))
        model.delete_adapter("default")
    for rank in (2, 5):
        add(both, "default", peft.LoraConfig(r=rank, use_dora=True, target_modules=TARGETS, init_lora_weights=False))
        for model in both:
            model.set_adapter("default")
        assert differ(*both, input_ids=IDS) < CLOSE
        assert on_our_way(both[1]) == 4
        for model in both:
            model.delete_adapter("default")


def test_mixed_batches_of_lora_and_their_refusal_of_dora(both):
    add(both, "plain", peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    for model in both:
        model.eval()
        with pytest.raises(ValueError, match="Cannot pass `adapter_names` when DoRA is enabled"):
            model(input_ids=IDS, adapter_names=["default", "plain"])
    got = [logits(model, adapter_names=["plain", "__base__"]) for model in both]
    assert torch.equal(*got)


def test_disabled(both):
    base = logits(tiny_llama())
    for model in both:
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
    assert differ(*both, input_ids=IDS) < CLOSE


# Files


def test_saved_files_are_the_same(both, tmp_path):
    for name, model in zip(("theirs", "ours"), both, strict=True):
        model.save_pretrained(tmp_path / name)
    theirs, ours = (tmp_path / "theirs", tmp_path / "ours")
    assert (theirs / "adapter_model.safetensors").read_bytes() == (ours / "adapter_model.safetensors").read_bytes()
    # PEFT writes a set of targets, whose order in a file is that of this process's hashes
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (theirs, ours)]
    targets = [sorted(config.pop("target_modules")) for config in configs]
    assert configs[0] == configs[1] and targets[0] == targets[1]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loaded_adapters(both, tmp_path, low_cpu_mem_usage):
    moved(both[0], seed=3).save_pretrained(tmp_path)
    for model in both:
        model.load_adapter(tmp_path, "loaded", low_cpu_mem_usage=low_cpu_mem_usage)
        model.set_adapter("loaded")
    assert differ(*both, input_ids=IDS) < CLOSE
    assert on_our_way(both[1]) == 4
    fresh = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert len(doratune.peft.accelerate(fresh).layers) == 4
    assert error(logits(fresh), logits(both[0])) < CLOSE


def test_state_dicts_of_each_load_into_the_other(both):
    theirs, ours = both
    moved(theirs, seed=4)
    ours.load_state_dict(theirs.state_dict())
    assert differ(theirs, ours, input_ids=IDS) < CLOSE
    theirs.load_state_dict(moved(ours, seed=6).state_dict())
    assert differ(theirs, ours, input_ids=IDS) < CLOSE


# Copies


def test_copies_are_accelerated_and_independent(both):
    theirs, ours = both
    logits(ours)
    for twin in (copy.deepcopy(ours), through_a_file(ours)):
        assert error(logits(twin), logits(theirs)) < CLOSE
        assert on_our_way(twin) == 4
        moved(twin, seed=9)
        assert error(logits(twin), logits(theirs)) > 1e-2
        assert error(logits(ours), logits(theirs)) < CLOSE
        twin.add_adapter("late", config(["v_proj"]))
        twin.set_adapter("late")
        assert on_our_way(twin) == 2
        doratune.peft.restore(twin)
        assert on_our_way(ours) == 4


def test_copies_of_a_merged_model(both):
    for model in both:
        model.merge_adapter()
    twins = [copy.deepcopy(model) for model in both]
    for model in twins:
        model.unmerge_adapter()
    assert differ(*twins, input_ids=IDS) < CLOSE


def test_a_shallow_copy_of_a_layer_leaves_the_layer_alone(both):
    layer = both[1].base_model.model.model.layers[0].self_attn.q_proj
    twin, x = copy.copy(layer), torch.randn(3, 32)
    assert torch.equal(twin(x), layer(x))
    assert on_our_way(both[1]) == 4


def through_a_file(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


# Scaling


def layers(model):
    return [module for module in model.modules() if hasattr(module, "scale_layer")]


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.scale_layer(0.5),
        lambda layer: layer.set_scale("default", 3.0),
        lambda layer: layer.set_scale("default", 0),
        lambda layer: (layer.scale_layer(0.5), layer.unscale_layer(0.25)),
        lambda layer: (layer.scale_layer(0.5), layer.unscale_layer(None)),
    ],
    ids=["scale", "set", "zero", "unscale", "reset"],
)
def test_the_scaling_of_now(both, change):
    for model in both:
        logits(model)
        for layer in layers(model):
            change(layer)
    assert differ(*both, input_ids=IDS) < CLOSE
    assert on_our_way(both[1]) == 4


def test_scaled_for_one_forward_and_unscaled_before_the_backward(both):
    """As diffusers does inside of a model's forward."""
    gradients = []
    for model in both:
        for _ in range(2):
            model.zero_grad()
            for layer in layers(model):
                layer.scale_layer(0.5)
            loss = model(input_ids=IDS, labels=IDS).loss
            for layer in layers(model):
                layer.unscale_layer(0.5)
            loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert max(error(b, a) for a, b in zip(*gradients, strict=True)) < CLOSE
    assert differ(*both, input_ids=IDS) < CLOSE


def test_rescaled_by_pefts_context(both):
    from peft.helpers import rescale_adapter_scale

    got = []
    for model in both:
        with rescale_adapter_scale(model, 0.3):
            got.append(logits(model))
    assert error(got[1], got[0]) < CLOSE
    assert differ(*both, input_ids=IDS) < CLOSE


# Moves, modes, hooks


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_after_it(both, dtype):
    theirs, ours = (model.to(dtype) for model in both)
    close = 1e-12 if dtype == torch.float64 else 0.1
    assert error(logits(ours), logits(theirs)) < close
    assert on_our_way(ours) == 4


@pytest.mark.parametrize("where", ["lora_A", "lora_B", "lora_dropout", "lora_magnitude_vector", "base_layer"])
def test_hooks_of_parts_run(both, where):
    counts = []
    for model in both:
        seen = []
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        part = getattr(layer, where)
        part = part if where == "base_layer" else part["default"]
        part.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        counts.append((logits(model), len(seen)))
    assert error(counts[1][0], counts[0][0]) < CLOSE
    assert counts[0][1] == counts[1][1]


def test_frozen_adapters_and_inference_mode(both):
    for model in both:
        for name, p in model.named_parameters():
            p.requires_grad_("lora_B" in name)
    assert differ(*both, input_ids=IDS) < CLOSE
    with torch.inference_mode():
        a, b = (model(input_ids=IDS).logits for model in both)
    assert error(b, a) < CLOSE


def test_status_repr_and_parameter_counts(both):
    theirs, ours = both
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert ours.get_model_status() == theirs.get_model_status()
    assert repr(ours).replace("Accelerated", "") == repr(theirs)


def test_functional_call_computes_with_what_it_is_given(both):
    theirs, ours = both
    other = {name: p * 1.5 for name, p in theirs.named_parameters() if "lora_" in name}
    a, b = (torch.func.functional_call(model, other, (), {"input_ids": IDS}).logits.detach() for model in both)
    assert error(b, a) < CLOSE
    assert differ(theirs, ours, input_ids=IDS) < CLOSE


def test_outputs_that_are_written_over(both):
    """By a later operation, in place."""

    class Written(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.layer = model.base_model.model.model.layers[0].self_attn.q_proj

        def forward(self, x):
            return torch.relu_(self.layer(x)) * 2

    x = torch.randn(5, 32)
    assert differ(*map(Written, both), x) < CLOSE


# torch.compile


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield lambda model, **settings: torch.compile(model, backend="aot_eager", **settings)
    torch._dynamo.reset()


def test_compiled(compiled):
    theirs, ours = pair(tiny_llama(layers=1), target_modules=TARGETS)
    fast = compiled(ours, fullgraph=True)
    expected, got = run(theirs, input_ids=IDS), run(fast, input_ids=IDS)
    assert error(got[0], expected[0]) < CLOSE
    own = {name.removeprefix("_orig_mod."): gradient for name, gradient in got[1].items()}
    assert max(error(own[name], gradient) for name, gradient in expected[1].items()) < CLOSE
    moved(theirs, seed=11), moved(ours, seed=11)  # no compilation later, other values
    assert error(logits(fast), logits(theirs)) < CLOSE


def test_compiled_with_a_scaling_that_changes_inside(both, compiled):
    """The change of a dict is carried out after a compiled forward has run: calls must have it all the same."""

    class Scaled(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model.base_model.model.model.layers[0].self_attn.q_proj

        def forward(self, x):
            self.inner.scale_layer(0.5)
            y = self.inner(x)
            self.inner.unscale_layer(0.5)
            return y

    theirs, ours = map(Scaled, both)
    x = torch.randn(5, 32)
    fast = compiled(ours)
    for _ in range(2):
        expected, got = run(theirs, x), run(fast, x)
        assert error(got[0], expected[0]) < CLOSE
        for a, b in zip(expected[1].values(), got[1].values(), strict=True):
            assert error(b, a) < CLOSE
    assert error(run(ours.inner, x)[0], run(theirs.inner, x)[0]) < CLOSE


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of PEFT's own forward, when it is traced
@pytest.mark.parametrize("state", ["merged", "disabled", "two active", "dropout"])
def test_compiled_in_other_states(compiled, state):
    theirs, ours = pair(Around(nn.Linear(8, 6), None), target_modules=["layer"], lora_dropout=0.3 if state == "dropout" else 0.0)
    x = torch.randn(5, 8)
    if state == "two active":
        add((theirs, ours), "two", config(["layer"]))
    for model in (theirs, ours):
        if state == "merged":
            model.merge_adapter()
        if state == "disabled":
            model.base_model.disable_adapter_layers()
        if state == "two active":
            model.base_model.set_adapter(["default", "two"])
        model.train(state == "dropout")
    fast = compiled(ours)
    if state == "dropout":
        assert torch.isfinite(run(fast, x)[0]).all()
        fast.eval(), theirs.eval()
    assert error(run(fast, x)[0], run(theirs, x)[0]) < CLOSE


# PEFT inside of other libraries


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_transformers_own_support(tmp_path):
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = tiny_llama()
        model.add_adapter(config(), adapter_name="one")
        models.append(moved(model))
    theirs, ours = models
    assert len(doratune.peft.accelerate(ours).layers) == 4
    assert differ(theirs, ours, input_ids=IDS) < CLOSE
    for model in models:
        torch.manual_seed(1)
        model.add_adapter(config(["v_proj", "q_proj"]), adapter_name="two")
        model.set_adapter("two")
    assert differ(theirs, ours, input_ids=IDS) < CLOSE
    assert on_our_way(ours) == 4
    ours.save_pretrained(tmp_path)
    for model in models:
        torch.manual_seed(2)  # transformers does not find the magnitude in PEFT's own files: it starts from A and B
        model.load_adapter(tmp_path, adapter_name="three")
        model.set_adapter("three")
        model.disable_adapters()
    assert torch.equal(logits(theirs), logits(tiny_llama())) and torch.equal(logits(ours), logits(tiny_llama()))
    for model in models:
        model.enable_adapters()
        model.set_adapter("three")
        model.delete_adapter("one")
    assert error(logits(ours), logits(theirs)) < CLOSE
    assert on_our_way(ours) == 4
    assert doratune.peft.restore(ours) is ours
    assert torch.equal(logits(theirs), logits(ours))


def test_diffusers_with_a_scale_of_one_call(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8,
    )  # fmt: skip
    targets = ["to_q", "to_v", "conv1", "conv_in", "time_emb_proj", "proj_in", "conv_shortcut"]
    unet.add_adapter(peft.LoraConfig(r=4, use_dora=True, init_lora_weights=False, target_modules=targets), "style")
    theirs, ours = moved(unet), copy.deepcopy(unet)
    report = doratune.peft.accelerate(ours)
    assert not report.left and len(report.layers) > 12
    inputs = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(3), "encoder_hidden_states": torch.randn(2, 5, 32)}
    for scale in (None, 0.4, 1.0):
        kwargs = None if scale is None else {"scale": scale}
        outputs = []
        for model in (theirs, ours):
            y = model(**inputs, cross_attention_kwargs=kwargs).sample
            model.zero_grad()
            y.square().sum().backward()
            outputs.append((y.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
        assert error(outputs[1][0], outputs[0][0]) < CLOSE
        assert max(error(b, a) for a, b in zip(outputs[0][1], outputs[1][1], strict=True)) < 1e-4
    assert set(ways(ours)) == {3}
    for model in (theirs, ours):
        model.fuse_lora(lora_scale=0.7)
        model.unfuse_lora()
    with torch.no_grad():
        assert error(ours(**inputs).sample, theirs(**inputs).sample) < 1e-4


def test_onnx_export_is_refused_with_the_way_out(both, tmp_path):
    pytest.importorskip("onnx")
    with pytest.raises(Exception, match=r"doratune.peft.restore\(model\)"):
        torch.onnx.export(both[1], (IDS,), tmp_path / "model.onnx", dynamo=False)


@pytest.fixture
def one_process():
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("first", ["accelerated", "sharded"])
def test_fsdp2_goes_pefts_way(one_process, first):
    from torch.distributed.fsdp import fully_shard

    theirs = dora(tiny_llama(), target_modules=TARGETS)
    ours = copy.deepcopy(theirs)
    if first == "accelerated":
        doratune.peft.accelerate(ours)
        logits(ours)
    for model in (theirs, ours):
        for block in (*model.base_model.model.model.layers, model):
            fully_shard(block, mesh=one_process)
    if first == "sharded":
        with pytest.raises(doratune.UserError, match="no DoRA layer"):
            doratune.peft.accelerate(ours)
    for _ in range(2):
        expected, got = run(theirs, input_ids=IDS), run(ours, input_ids=IDS)
        assert torch.equal(got[0], expected[0])
        assert all(torch.equal(got[1][name].full_tensor(), g.full_tensor()) for name, g in expected[1].items())


def test_offloaded_layers_go_pefts_way():
    accelerate = pytest.importorskip("accelerate")
    models = pair(tiny_llama(), target_modules=TARGETS)
    expected = logits(models[0])
    results = []
    for model in models:
        accelerate.cpu_offload(model, execution_device="cpu")
        try:
            results.append(error(logits(model), expected))
        except (NotImplementedError, RuntimeError) as problem:  # PEFT reads the weight past the hook that brings it
            results.append(type(problem))
    assert results[0] == results[1]
