"""Models whose weights accelerate keeps on the CPU or on the disk: looked at, saved, loaded and merged as whole ones are."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from conftest import randomize, tiny_gpt2, tiny_llama
from safetensors.torch import load_file
from torch import nn

import doratune
from doratune.errors import UserError

IDS = torch.randint(3, 300, (2, 70), generator=torch.Generator().manual_seed(0))
METHODS = {"dora": {}, "lora": {"method": "lora"}, "dvora": {"method": "dvora"}, "relative": {"magnitude_form": "relative"}}
METHODS |= {"input axis": {"magnitude_axis": "input"}}


def off(model, where, folder):
    if where == "cpu":
        return cpu_offload(model, execution_device="cpu")
    return disk_offload(model, str(folder / "offload"), execution_device="cpu")


def adapted(make=tiny_llama, **settings):
    return randomize(doratune.attach(make(), doratune.AdapterConfig(**{"rank": 2} | settings)))


@pytest.fixture(params=["cpu", "disk"])
def where(request):
    return request.param


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("method", METHODS)
def test_looks_like_the_whole_model(method, make, where, tmp_path):
    plain, model = (adapted(make, **METHODS[method]) for _ in range(2))
    model = off(model, where, tmp_path)
    with torch.no_grad():
        expected = plain(input_ids=IDS).logits
        assert torch.equal(model(input_ids=IDS).logits, expected)
    assert str(doratune.verify(model)) == str(doratune.verify(plain))
    assert doratune.inspect(model).rows == doratune.inspect(plain).rows  # accelerate counts a tied head twice
    for one, name in ((model, "offloaded"), (plain, "plain")):
        doratune.save(one, tmp_path / name)
    for file in (tmp_path / "plain").glob("*.safetensors"):
        other = load_file(tmp_path / "offloaded" / file.name)
        assert all(torch.equal(t, other[key]) for key, t in load_file(file).items())
    merged = doratune.merged_state_dict(model)
    assert all(torch.equal(t, merged[key]) for key, t in doratune.merged_state_dict(plain).items())
    assert all(p.is_meta for name, p in model.named_parameters() if "proj" in name)  # put away again


def test_before_any_forward(where, tmp_path):
    plain, model = adapted(), off(adapted(), where, tmp_path)
    doratune.save(model, tmp_path / "adapter")
    assert doratune.inspect(model).table() == doratune.inspect(plain).table()
    doratune.verify(model)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_is_loaded_over_offloaded_weights(method, where, tmp_path):
    plain = adapted(**METHODS[method])
    doratune.save(plain, tmp_path / "adapter")
    model = doratune.load(off(tiny_llama(), where, tmp_path), tmp_path / "adapter")
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    layers = [layer.adapted for _, layer in doratune.adapters(model)]
    assert {layer.preparations for layer in layers} == {1}  # not once for each fetched copy


def mixtral():
    from transformers import AutoModelForCausalLM, MixtralConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(**sizes, num_key_value_heads=1, head_dim=8, num_experts_per_tok=2, num_local_experts=4)
    return AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()


def test_experts(where, tmp_path):
    settings = {"rank": 2, "targets": ["gate_up_proj", "down_proj", "q_proj"]}
    plain = randomize(doratune.attach(mixtral(), doratune.AdapterConfig(**settings)))
    doratune.save(plain, tmp_path / "adapter")
    model = doratune.load(off(mixtral(), where, tmp_path), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    doratune.save(model, tmp_path / "again")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert all(torch.equal(t, two[key]) for key, t in one.items())


def test_training_over_offloaded_weights_is_refused(where, tmp_path):
    model = off(tiny_llama(), where, tmp_path)
    with pytest.raises(UserError, match=r"accelerate offloads it.*attach with trainable=False"):
        doratune.attach(model, doratune.AdapterConfig(rank=2))
    assert not list(doratune.adapters(model))


def test_merges_in_memory_and_back(tmp_path):
    plain, model = adapted(), off(adapted(), "cpu", tmp_path)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        for one in (plain, model):
            doratune.merge(one)
        assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
        doratune.unmerge(model)
        assert torch.equal(model(input_ids=IDS).logits, before)


def test_files_are_not_merged_into(tmp_path):
    model = off(adapted(), "disk", tmp_path)
    files = {path: path.read_bytes() for path in (tmp_path / "offload").iterdir()}
    with pytest.raises(UserError, match=r"offloaded to files.*merged_state_dict.*doratune merge"):
        doratune.merge(model)
    assert files == {path: path.read_bytes() for path in (tmp_path / "offload").iterdir()}
    assert len(list(doratune.adapters(model))) == 14


def test_weights_that_are_nowhere_are_named(tmp_path):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UserError, match="0: the weight is on the meta device; load the model's weights"):
        doratune.attach(model, doratune.AdapterConfig(rank=2, targets=["0"]), trainable=False)
