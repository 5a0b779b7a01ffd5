"""Names are those of the plain model, whatever stands around it or its layers: compiled, parallel, checkpointed."""

import pytest
import torch
from accelerate.utils.other import compile_regions
from conftest import randomize, tiny_llama
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.optim.swa_utils import AveragedModel

import doratune
from doratune import AdapterConfig
from doratune.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # from inside PyTorch's compiler

IDS = torch.arange(3, 15)[None]
CONFIG = AdapterConfig(rank=4, targets=["q_proj", "up_proj"], also_train=["norm"], rank_overrides={"layers.1.mlp.up_proj": 2})
PARAMETERS = 2 * 2 * 3 + 1


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def compiled(module):
    return torch.compile(module, backend="eager")


def each_layer(wrap):
    def wrapped(model):
        for index, layer in enumerate(model.model.layers):
            model.model.layers[index] = wrap(layer)
        return model

    return wrapped


def leaves(wrap):
    def wrapped(model):
        for layer in model.model.layers:
            layer.mlp.up_proj = wrap(layer.mlp.up_proj)
        model.model.norm = wrap(model.model.norm)
        return model

    return wrapped


def body(model):
    model.model = compiled(model.model)
    return model


WAYS = {
    "compiled": compiled,
    "parallel": nn.DataParallel,
    "checkpointed": checkpoint_wrapper,
    "parallel around compiled": lambda model: nn.DataParallel(compiled(model)),
    "averaged": AveragedModel,
    "its body compiled": body,
    "layers compiled": each_layer(compiled),
    "layers checkpointed": each_layer(checkpoint_wrapper),
    "layers offloaded": each_layer(offload_wrapper),
    "linear layers compiled": leaves(compiled),
    "linear layers checkpointed": leaves(checkpoint_wrapper),
    "regions": lambda model: compile_regions(model, backend="eager"),
}


def moved(model):
    """An attached model away from its start, the whole module too."""
    randomize(model)
    with torch.no_grad():
        for group in doratune.parameter_groups(model):
            for p in group["params"] if group["name"].startswith("whole") else ():
                p.mul_(1.1)
    return model


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(folder of an adapter of the plain model, its keys, its logits, the base's logits)."""
    model = tiny_llama()
    base = logits(model)
    moved(doratune.attach(model, CONFIG))
    folder = tmp_path_factory.mktemp("plain")
    doratune.save(model, folder)
    return folder, set(load_file(folder / "adapter_model.safetensors")), logits(model), base


@pytest.fixture
def _not_compiled():
    """Wrapped as for compiling, and run as it is: seconds instead of minutes."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.usefixtures("_not_compiled")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("way", WAYS)
def test_everything_works_and_files_are_those_of_the_plain_model(way, when, plain, tmp_path):
    folder, keys, expected, base = plain
    model = tiny_llama().eval()
    grad = [p.requires_grad for p in model.parameters()]
    if when == "before":
        model = WAYS[way](model).eval()
        assert doratune.attach(model, CONFIG) is model
    else:
        doratune.attach(model, CONFIG)
        model = WAYS[way](model).eval()
    moved(model)
    doratune.refresh(model)
    assert torch.equal(logits(model), expected)
    assert doratune.verify(model, {"input_ids": IDS}).ok
    assert len(doratune.inspect(model).rows) == 4
    groups = doratune.parameter_groups(model)
    assert sum(len(group["params"]) for group in groups) == PARAMETERS
    model(IDS).logits.sum().backward()
    assert all(p.grad is not None for group in groups for p in group["params"])
    doratune.save(model, tmp_path / "unmerged")
    doratune.merge(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    doratune.save(model, tmp_path / "merged")
    doratune.unmerge(model)
    for saved in ("unmerged", "merged"):
        assert set(load_file(tmp_path / saved / "adapter_model.safetensors")) == keys
        assert torch.equal(logits(doratune.load(tiny_llama(), tmp_path / saved)), expected)
    doratune.detach(model)
    assert torch.equal(logits(model), base)
    assert [p.requires_grad for p in model.parameters()] == grad
    assert not any("doratune" in type(module).__module__ for module in model.modules())
    assert torch.equal(logits(doratune.load(WAYS[way](tiny_llama()).eval(), folder)), expected)


@pytest.mark.parametrize("wrap", [compiled, leaves(compiled)])
def test_code_that_was_compiled_for_the_base_does_not_run_for_the_adapted_model(wrap, plain):
    _, _, expected, base = plain
    model = wrap(tiny_llama())
    assert torch.equal(logits(model), base)
    moved(doratune.attach(model, CONFIG))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    doratune.detach(model)
    torch.testing.assert_close(logits(model), base, rtol=1e-4, atol=1e-5)


@pytest.fixture
def _one_process():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_distributed_data_parallel(plain, tmp_path):
    """It knows the parameters that it was made with: attached first, or for inference only."""
    folder, keys, expected, base = plain
    ddp = nn.parallel.DistributedDataParallel
    late = ddp(tiny_llama())
    for attach in (lambda: doratune.attach(late, CONFIG), lambda: doratune.load(late, folder, trainable=True)):
        with pytest.raises(UserError, match="attach first, then wrap"):
            attach()
    assert torch.equal(logits(late), base)
    assert torch.equal(logits(doratune.load(late, folder)), expected)
    model = ddp(doratune.attach(tiny_llama(), CONFIG)).eval()
    moved(model)
    assert torch.equal(logits(model), expected)
    assert doratune.verify(model, {"input_ids": IDS}).ok
    doratune.save(model, tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == keys
    doratune.detach(model)
    assert torch.equal(logits(model), base)


def test_a_users_own_child_called_module_keeps_its_name(tmp_path):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential()
        model.add_module("module", nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
        return model

    model = moved(doratune.attach(build(), AdapterConfig(rank=2)))
    assert [name for name, _ in doratune.adapters(nn.DataParallel(model))] == ["module.0", "module.1"]
    doratune.save(model, tmp_path)
    x = torch.randn(2, 6)
    assert torch.equal(doratune.load(nn.DataParallel(build()), tmp_path)(x), model(x))


SPELLINGS = {
    "_orig_mod": lambda name: f"_orig_mod.{name}",
    "module": lambda name: f"module.{name}",
    "module of _orig_mod": lambda name: f"module._orig_mod.{name}",
    "twice the prefix": lambda name: f"base_model.model.{name}",
    "FSDP": lambda name: "_fsdp_wrapped_module." + name.replace("self_attn", "_fsdp_wrapped_module.self_attn"),
    "checkpointed": lambda name: name.replace("mlp.", "_checkpoint_wrapped_module.mlp.").replace("self", "_orig_mod.self"),
}


def spelled(source, target, spell, targets=None):
    """A copy of an adapter folder with other module names in its keys, and in its targets."""
    import json
    import shutil

    shutil.copytree(source, target)
    prefix = "base_model.model."
    tensors = load_file(target / "adapter_model.safetensors")
    save_file({prefix + spell(key.removeprefix(prefix)): t for key, t in tensors.items()}, target / "adapter_model.safetensors")
    if targets is not None:
        for name, field in (("adapter_config.json", "target_modules"), ("doratune.json", "targets")):
            content = json.loads((target / name).read_text())
            content.get("adapter", content)[field] = targets
            (target / name).write_text(json.dumps(content))


@pytest.mark.parametrize("in_targets", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_that_a_wrapper_made_are_understood(spelling, in_targets, plain, tmp_path):
    folder, _, expected, _ = plain
    names = [name for name, _ in doratune.adapters(doratune.attach(tiny_llama(), CONFIG))]
    targets = [SPELLINGS[spelling](name) for name in names] if in_targets else None
    spelled(folder, tmp_path / "spelled", SPELLINGS[spelling], targets)
    assert torch.equal(logits(doratune.load(tiny_llama(), tmp_path / "spelled")), expected)


def test_a_regex_with_a_wrappers_segment_is_understood(plain, tmp_path):
    folder, _, expected, _ = plain
    spelled(folder, tmp_path / "a", SPELLINGS["_orig_mod"], r"_orig_mod\.model\..*(q_proj|up_proj)")
    assert torch.equal(logits(doratune.load(tiny_llama(), tmp_path / "a")), expected)


def test_two_names_that_become_one_are_refused(plain, tmp_path):
    folder = plain[0]
    spelled(folder, tmp_path / "twice", lambda name: name)
    path = tmp_path / "twice" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "lora_A" in key)
    save_file(tensors | {key.replace("model.layers", "model._orig_mod.layers"): tensors[key].clone()}, path)
    with pytest.raises(UserError, match=r"holds .*lora_A twice"):
        doratune.load(tiny_llama(), tmp_path / "twice")


def test_what_does_not_fit_shows_both_halves(plain, tmp_path):
    spelled(plain[0], tmp_path / "other", lambda name: f"backbone.{name}", ["backbone.model.layers.0.self_attn.q_proj"])
    with pytest.raises(UserError) as caught:
        doratune.load(tiny_llama(), tmp_path / "other")
    text = str(caught.value)
    assert "the file is of backbone.model.layers.0.mlp.up_proj" in text
    assert "the model has model.layers.0." in text
    assert "\n" not in text
