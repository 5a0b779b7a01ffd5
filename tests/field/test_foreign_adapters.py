"""Adapters of other packages: attaching over one and putting one over ours are refused; nothing is touched."""

import copy

import peft
import pytest
import torch
from conftest import randomize, tiny_llama
from torch import nn

import doratune
from doratune import AdapterConfig
from doratune.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT, of norms that are not PyTorch's own

IDS = torch.arange(3, 15)[None]
CONFIG = AdapterConfig(rank=2, targets=["q_proj", "v_proj"])

THEIRS = {
    "LoRA": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "DoRA": lambda: peft.LoraConfig(r=2, target_modules=["v_proj"], use_dora=True, task_type="CAUSAL_LM"),
    "LoRA elsewhere": lambda: peft.LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM"),
    "a head trained whole": lambda: peft.LoraConfig(r=2, target_modules=["up_proj"], modules_to_save=["lm_head"]),
    "LoHa": lambda: peft.LoHaConfig(r=2, target_modules=["q_proj"]),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    "layer norms": lambda: peft.LNTuningConfig(target_modules=["norm"]),
}


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", THEIRS)
def test_attach_and_load_over_theirs(name, tmp_path):
    doratune.save(doratune.attach(tiny_llama(), CONFIG), tmp_path)
    wrapped = peft.get_peft_model(tiny_llama(), THEIRS[name]())
    for model in (wrapped, wrapped.base_model.model):
        before = {key: t.clone() for key, t in model.state_dict().items()}
        for act in (lambda m: doratune.attach(m, CONFIG), lambda m: doratune.load(m, tmp_path)):
            with pytest.raises(UserError, match=r"another package's adapter: .*; call merge_and_unload\(\) or unload\(\)"):
                act(model)
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(t, after[key]) for key, t in before.items())
    plain = wrapped.merge_and_unload()
    assert len(list(doratune.adapters(doratune.attach(plain, CONFIG)))) == 4


@pytest.mark.filterwarnings("ignore:.*second time.*:UserWarning", "ignore:Already found a `peft_config`.*:UserWarning")
@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("way", ["get_peft_model", "mixed", "inject", "add_adapter", "an inner model"])
def test_theirs_over_ours(way, name):
    model = randomize(doratune.attach(tiny_llama(), CONFIG))
    expected, keys = logits(model), list(model.state_dict())
    grad = [p.requires_grad for p in model.parameters()]
    ways = {
        "get_peft_model": lambda config: peft.get_peft_model(model, config),
        "mixed": lambda config: peft.get_peft_model(model, config, mixed=True),
        "inject": lambda config: peft.inject_adapter_in_model(config, model),
        "add_adapter": model.add_adapter,
        "an inner model": lambda config: peft.inject_adapter_in_model(config, model.model),
    }
    if way == "mixed" and name in ("IA3", "layer norms"):
        pytest.skip("PEFT mixes other kinds only")
    with pytest.raises(UserError, match=r"has a doratune adapter; call doratune\.detach\(model\), or doratune\.merge\(model\)"):
        ways[way](THEIRS[name]())
    assert list(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == grad
    assert torch.equal(logits(model), expected)
    assert doratune.verify(model).ok
    doratune.detach(model)
    peft.get_peft_model(model, THEIRS[name]())  # as on any model


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`.*:UserWarning")
def test_a_folder_of_peft_over_ours(tmp_path):
    peft.get_peft_model(tiny_llama(), THEIRS["LoRA"]()).save_pretrained(tmp_path)
    model = doratune.attach(tiny_llama(), CONFIG)
    for act in (lambda: peft.PeftModel.from_pretrained(model, tmp_path), lambda: model.load_adapter(str(tmp_path))):
        with pytest.raises(UserError, match="has a doratune adapter"):
            act()


def test_theirs_around_one_of_our_layers_is_seen_later():
    """A layer that PEFT wrapped by hand, which no guard sees: nothing is saved, merged or taken off under wrong names."""
    model = doratune.attach(tiny_llama(), CONFIG)
    attention = model.model.layers[0].self_attn
    config = THEIRS["LoRA"]()
    attention.q_proj = peft.tuners.lora.layer.Linear(attention.q_proj, "default", config, r=2, lora_alpha=2)
    for act in (doratune.detach, doratune.merge, doratune.parameter_groups, lambda m: doratune.save(m, "never")):
        with pytest.raises(UserError, match=r"another package's adapter: model\.layers\.0\.self_attn\.q_proj"):
            act(model)
    assert any("another package's adapter" in problem for problem in doratune.verify(model).problems)


def test_prompts_of_peft():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    wrapped = peft.get_peft_model(tiny_llama(), config)
    with pytest.raises(UserError, match=r"another package's adapter: PeftModelForCausalLM; call get_base_model\(\)"):
        doratune.attach(wrapped, CONFIG)
    doratune.attach(wrapped.get_base_model(), CONFIG)
    for act in (lambda: doratune.save(wrapped, "never"), lambda: doratune.parameter_groups(wrapped)):
        with pytest.raises(UserError, match="a part of it is: pass the model that was given"):
            act()


AROUND = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "multitask": lambda: peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2),
    "CPT": lambda: peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[3, 4], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 1]),
    "adaption prompt": lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1),
}


@pytest.mark.parametrize("way", ["attached", "a copy", "as PEFT", "in use again", "with a head"])
@pytest.mark.parametrize("name", AROUND)
def test_prompts_over_ours(name, way):
    """They put nothing into a layer, and freeze the whole model: ours would be neither trained nor saved."""
    config = AdapterConfig(rank=2, targets=["q_proj"], also_train=["norm"]) if way == "with a head" else CONFIG
    model = randomize(doratune.attach(tiny_llama(), config))
    over = {
        "a copy": copy.deepcopy,
        "as PEFT": doratune.as_peft,
        "in use again": lambda m: doratune.use(doratune.use(m, None), "default"),
    }.get(way, lambda m: m)(model)
    expected, modules = logits(over), [type(m) for m in over.modules()]
    grad = [p.requires_grad for p in over.parameters()]
    with pytest.raises(UserError, match=r"has a doratune adapter; call doratune\.detach\(model\), or doratune\.merge\(model\)"):
        peft.get_peft_model(over, AROUND[name]())
    assert [type(m) for m in over.modules()] == modules
    assert [p.requires_grad for p in over.parameters()] == grad
    assert torch.equal(logits(over), expected)
    assert doratune.verify(over).ok
    doratune.merge(over)
    peft.get_peft_model(model if way == "as PEFT" else over, AROUND[name]())  # as on any model


def test_attaching_under_an_adaption_prompt():
    wrapped = peft.get_peft_model(tiny_llama(), AROUND["adaption prompt"]())
    for model in (wrapped, wrapped.base_model.model):
        with pytest.raises(UserError, match=r"another package's adapter: .*self_attn \(AdaptedAttention\)"):
            doratune.attach(model, CONFIG)


class OtherLayer(nn.Module):
    """What a layer of the package `adapters` looks like: a frozen layer's stand-in with a container of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.loras = nn.ModuleDict({"mine": nn.Linear(4, 4)})


class TunedLayer(nn.Module):
    """What PEFT's layers look like, of a package that is not PEFT."""

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(4, 4)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2)})


@pytest.mark.parametrize("layer", [OtherLayer, TunedLayer])
def test_packages_that_are_not_known_by_class(layer):
    model = nn.Sequential(nn.Linear(4, 4), layer())
    with pytest.raises(UserError, match=f"another package's adapter: 1 \\({layer.__name__}\\)"):
        doratune.attach(model, AdapterConfig(rank=2))


def test_a_users_own_base_layer_is_no_adapter():
    model = nn.Sequential()
    model.add_module("base_layer", nn.Linear(4, 4))
    model.add_module("head", nn.Linear(4, 4))
    assert len(list(doratune.adapters(doratune.attach(model, AdapterConfig(rank=2))))) == 2
