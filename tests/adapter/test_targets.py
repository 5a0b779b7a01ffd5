"""AdapterConfig and target selection: what is taken, what is left out and why, and one clear line for every mistake."""

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama
from torch import nn

import doratune
from doratune import AdapterConfig
from doratune.adapter.targets import select
from doratune.errors import UserError


def names(model, **config):
    return set(select(model, AdapterConfig(**config)).ranks)


def test_lists_regexes_and_all_linear():
    model = tiny_llama()
    assert len(names(model, targets=["q_proj"])) == 2
    assert names(model, targets=["layers.1.self_attn.q_proj"]) == {"model.layers.1.self_attn.q_proj"}
    assert names(model, targets=r"model\.layers\.0\.mlp\.(up|down)_proj") == {
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
    }
    everything = select(model, AdapterConfig())
    assert len(everything.ranks) == 14
    assert everything.left_out == {"lm_head": "output head"}
    assert len(names(tiny_gpt2())) == 8


def test_magnitude_only_exclude_and_overrides():
    config = AdapterConfig(
        targets=["q_proj", "v_proj"],
        magnitude_only=["o_proj"],
        exclude=["layers.0.self_attn.v_proj"],
        rank_overrides={"layers.1.self_attn.q_proj": 3},
        alpha_overrides={"v_proj": 7},
    )
    s = select(tiny_llama(), config)
    prefix = "model.layers."
    assert s.ranks == {
        f"{prefix}0.self_attn.q_proj": 16,
        f"{prefix}0.self_attn.o_proj": 0,
        f"{prefix}1.self_attn.q_proj": 3,
        f"{prefix}1.self_attn.v_proj": 16,
        f"{prefix}1.self_attn.o_proj": 0,
    }
    assert s.alphas[f"{prefix}1.self_attn.v_proj"] == 7
    assert s.left_out[f"{prefix}0.self_attn.v_proj"] == "excluded"


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("layers", [1, [0], range(2)])
def test_layers_as_peft_takes_them(build, layers, tmp_path):
    import peft

    model, targets = build(), ["q_proj", "up_proj"] if build is tiny_llama else ["c_attn", "c_fc"]
    config = AdapterConfig(rank=2, targets=targets, layers=layers)
    doratune.attach(model, config)
    theirs = peft.LoraConfig(
        target_modules=targets,
        layers_to_transform=layers if type(layers) is int else list(layers),
        fan_in_fan_out=build is tiny_gpt2,
    )
    lora = peft.get_peft_model(build(), theirs)
    expected = [n.removeprefix("base_model.model.") for n, m in lora.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert [name for name, _ in doratune.adapters(model)] == expected
    doratune.save(model, tmp_path)
    again = doratune.load(build(), tmp_path)
    assert [name for name, _ in doratune.adapters(again)] == expected
    in_peft = peft.PeftModel.from_pretrained(build(), tmp_path)
    assert sum(isinstance(m, peft.tuners.lora.LoraLayer) for m in in_peft.modules()) == len(expected)


def test_layers_go_by_the_first_index():
    from transformers import MixtralConfig, MixtralForCausalLM, T5Config, T5ForConditionalGeneration

    t5 = T5ForConditionalGeneration(T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2))
    assert names(t5, targets=["q"], layers=[1], rank=2) == {
        "encoder.block.1.layer.0.SelfAttention.q",
        "decoder.block.1.layer.0.SelfAttention.q",
        "decoder.block.1.layer.1.EncDecAttention.q",
    }
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    mixtral = MixtralForCausalLM(MixtralConfig(vocab_size=30, num_hidden_layers=2, num_local_experts=2, **sizes))
    assert {name.split(".")[2] for name in names(mixtral, targets="all-layers", layers=[1], rank=2)} == {"1"}
    assert names(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), layers=[0], rank=2) == {"0"}
    s = select(tiny_llama(), AdapterConfig(targets=["q_proj", "lm_head"], magnitude_only=["v_proj"], layers=[1]))
    assert s.ranks == {"model.layers.1.self_attn.q_proj": 16, "model.layers.1.self_attn.v_proj": 0}
    assert s.left_out["lm_head"] == s.left_out["model.layers.0.self_attn.q_proj"] == "in another layer (layers)"


def test_scaling_keeps_the_global_alpha():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    config = AdapterConfig(rank=4, alpha=8, targets=["0", "1"], rank_overrides={"1": 16}, rank_scaling="rslora")
    doratune.attach(model, config)
    assert (model[0].scaling, model[1].scaling) == (4.0, 2.0)


def test_bypassed_modules_are_left_out_and_refused_by_name():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1, enable_nested_tensor=False)
    wrapped = nn.ModuleDict({"encoder": model, "head": nn.Linear(16, 16)})
    s = select(wrapped, AdapterConfig())
    assert {name.split(".")[-1] for name in s.ranks} == {"head", "linear1", "linear2"}
    assert {name.split(".")[-1] for name in s.left_out} == {"out_proj"}
    with pytest.raises(UserError, match="forward: adapt self_attn itself"):
        select(wrapped, AdapterConfig(targets=["out_proj"]))


MISTAKES = [
    ({"rank": 0}, "rank is 0"),
    ({"rank": -4}, "rank is -4"),
    ({"rank": 2.5}, "rank is 2.5"),
    ({"rank": True}, "rank is True"),
    ({"alpha": 0}, "alpha is 0"),
    ({"dropout": 1.0}, "dropout is 1.0"),
    ({"method": "dorra"}, "did you mean 'dora'"),
    ({"magnitude_axis": "rows"}, "expected one of output, input"),
    ({"norm_gradient": "on"}, "expected one of detached, full"),
    ({"rank_overrides": {"q_proj": 0}}, "rank_overrides"),
    ({"targets": 7}, "targets is 7"),
    ({"method": "lora", "magnitude_only": ["o_proj"]}, "magnitude_only needs"),
    ({"seed": "x"}, "seed is 'x'"),
    ({"layers": [-1]}, "layers is [-1]; expected indices of layers"),
    ({"layers": "0-3"}, "layers is '0-3'"),
    ({"layers": [True]}, "layers is [True]"),
    ({"seed": 2**32}, "seed is 4294967296"),
    ({"alpha_overrides": {"q_proj": float("inf")}}, "alpha_overrides"),
]


@pytest.mark.parametrize(("settings", "message"), MISTAKES)
def test_config_mistakes(settings, message):
    with pytest.raises(UserError) as caught:
        AdapterConfig(**settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_setting_names_near_misses():
    with pytest.raises(UserError, match="unknown adapter setting 'rnk'; did you mean 'rank'"):
        AdapterConfig.from_dict({"rnk": 4})
    with pytest.raises(TypeError):
        AdapterConfig(rnk=4)
    config = AdapterConfig(targets=["a"], rank_overrides={"a": 2})
    assert AdapterConfig.from_dict(config.to_dict()) == config


TARGET_MISTAKES = [
    ({"targets": ["q_prj"]}, "did you mean 'q_proj'"),
    ({"targets": ["q_proj", "nothing_like_it"]}, "'nothing_like_it' matches no module"),
    ({"targets": "q_proj"}, "did you mean 'q_proj'"),
    ({"targets": "q_proj"}, "matches no whole module name, and as a list, ['q_proj'], it is the end of names"),
    ({"targets": "(q_proj"}, "not a valid regular expression"),
    ({"targets": ["mlp"]}, "its layers: down_proj, gate_proj, up_proj"),
    ({"targets": ["input_layernorm"]}, "LlamaRMSNorm"),
    ({"targets": ["q_proj"], "magnitude_only": ["q_proj"]}, "named by both"),
    ({"targets": ["q_proj"], "exclude": ["q_proj"]}, "select no module"),
    ({"targets": ["q_proj"], "rank_overrides": {"v_proj": 3}}, "'v_proj' fits no target"),
    ({"targets": ["q_proj"], "also_train": ["lm_hed"]}, "did you mean 'lm_head'"),
    ({"layers": [0, 7, 9]}, "none of the selected modules is in layer 7, 9; they are in layers 0 to 1"),
    ({"targets": ["lm_head"], "layers": [0]}, "their names have no index"),
]


@pytest.mark.parametrize(("settings", "message"), TARGET_MISTAKES)
def test_target_mistakes_leave_the_model_alone(settings, message):
    model = tiny_llama()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(UserError) as caught:
        doratune.attach(model, AdapterConfig(**settings))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not list(doratune.adapters(model))


def test_tied_quantized_and_empty_weights_are_refused():
    with pytest.raises(UserError, match=r"tied to model\.embed_tokens\.weight"):
        doratune.attach(tiny_llama(tie=True), AdapterConfig(targets=["lm_head"]))
    packed = nn.Sequential(nn.Linear(4, 4))
    packed[0].weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match="a storage that is not known"):
        doratune.attach(packed, AdapterConfig(rank=2, targets=["0"]))
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UserError, match="meta device"):
        doratune.attach(empty, AdapterConfig(rank=2, targets=["0"]))


def test_also_train_is_restored_by_detach():
    model = tiny_llama()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    doratune.attach(model, AdapterConfig(targets=["q_proj"], also_train=["lm_head", "norm"]))
    assert model.lm_head.weight.requires_grad
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    groups = {g["name"]: len(g["params"]) for g in doratune.parameter_groups(model)}
    assert groups == {"factors": 4, "whole": 1, "whole_vectors": 1, "magnitude": 2}
    doratune.detach(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_detach_after_a_dtype_change_with_whole_modules():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    base = model(torch.randn(6, 4)).detach() * 0 + model[1].running_mean
    doratune.attach(model, AdapterConfig(rank=2, targets=["0"], also_train=["1", "2"]))
    model.train()
    model(torch.randn(6, 4))
    model.bfloat16()
    doratune.detach(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(model[1].running_mean.float(), base[0].float(), rtol=1e-2, atol=1e-2)


def test_ties_inside_a_whole_module_and_overlapping_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    model = nn.ModuleDict({"block": Tied(), "other": nn.Linear(4, 4)})
    original = model["block"].a.weight
    doratune.attach(model, AdapterConfig(rank=2, targets=["other"], also_train=["block", "head"]))
    assert model["block"].a.weight is model["block"].b.weight is not original
    doratune.detach(model)
    assert model["block"].a.weight is model["block"].b.weight is original


def test_verify_finds_what_is_wrong():
    model = tiny_llama()
    doratune.attach(model, AdapterConfig(rank=2, targets=["q_proj", "v_proj"]))
    ids = {"input_ids": torch.tensor([[4, 5, 6]])}
    report = doratune.verify(model, example=ids)
    assert report.ok
    assert report.adapted == 4
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.magnitude.mul_(1.5)
    assert doratune.verify(model, example=ids).ok  # trained: nothing to compare with the base
    layer.magnitude.requires_grad_(False)
    layer.lora_A.data = layer.lora_A.data.bfloat16()
    with torch.no_grad():
        layer.lora_B.fill_(float("inf"))
    text = str(doratune.verify(model))
    for expected in ("magnitude is not trainable", "lora_A is torch.bfloat16", "lora_B holds NaN or infinite"):
        assert expected in text
    model.model.layers[1].self_attn.v_proj = nn.Linear(32, 16)
    assert "no longer adapted" in str(doratune.verify(model))


def test_verify_reports_zero_clamped_and_idle():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.used(x)

    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.used.weight[2] = 0
    doratune.attach(net, AdapterConfig(rank=6, alpha=6, targets=["used", "idle"]))
    with torch.no_grad():
        net.used.lora_A.copy_(torch.eye(6))
        net.used.lora_B[4] = -net.used.weight[4]  # V = 0 in row 4
    report = doratune.verify(net, example=torch.randn(2, 6))
    assert report.zero_rows == {"used": 1}
    assert report.clamped_rows == {"used": 1}
    assert report.never_ran == ["idle"]
    assert torch.isfinite(net(torch.randn(3, 6))).all()
