"""Merged for good, a model is an ordinary one: saved as plain, trained, attached anew, loaded into, merged a second time."""

import warnings

import pytest
import torch
from conftest import randomize, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import doratune
from doratune import AdapterConfig, UserError

IDS = torch.arange(3, 15)[None]
QV = AdapterConfig(rank=2, targets=["q_proj", "v_proj"])
CONFIGS = {
    "dora": QV,
    "lora": AdapterConfig(method="lora", rank=2),
    "vera": AdapterConfig(method="dvora", rank=4),
    "input axis": AdapterConfig(rank=2, magnitude_axis="input"),
    "magnitude alone": AdapterConfig(rank=2, targets=(), magnitude_only=["up_proj"]),
    "relative": AdapterConfig(rank=2, targets=["q_proj"], magnitude_form="relative"),
    "modules trained whole": AdapterConfig(rank=2, targets=["q_proj"], also_train=["norm", "lm_head"]),
    "an embedding": AdapterConfig(rank=2, targets=["embed_tokens", "q_proj"]),
}


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture
def base(base_folder):
    return lambda **settings: AutoModelForCausalLM.from_pretrained(base_folder, **settings).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_second_adapter_over_the_merged_weights(name, base, tmp_path):
    plain, model = base(), randomize(doratune.attach(base(), CONFIGS[name]))
    expected = logits(model)
    assert doratune.merge(model, keep="none") == 0
    merged = logits(model)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {n: True for n, _ in plain.named_parameters()}
    model.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()), merged)
    doratune.attach(model, QV)
    assert torch.equal(logits(model), merged)  # an exact start over the weights of now
    assert doratune.verify(model).ok
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora" not in n and "magnitude" not in n)
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    randomize(model, seed=5)
    second = logits(model)
    assert not torch.equal(second, merged)
    doratune.merge(model)  # a second merge, which is undone to the first one
    torch.testing.assert_close(logits(model), second, rtol=1e-4, atol=1e-5)
    doratune.unmerge(model)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)
    doratune.detach(model)
    assert torch.equal(logits(model), merged)


def test_each_call_on_a_model_that_was_merged_for_good(base, tmp_path):
    doratune.save(randomize(doratune.attach(base(), QV), seed=3), tmp_path / "other")
    merged = randomize(doratune.attach(base(), QV))
    doratune.merge(merged, keep="none")
    expected = logits(merged)
    doratune.save(merged, tmp_path / "what was merged")  # as before
    for call, text in (
        (lambda: doratune.unmerge(merged), "no original weight was kept"),
        (lambda: doratune.merge(merged), "merged already; it has no adapter any more"),
        (
            lambda: doratune.parameter_groups(merged),
            r"merged for good .* call doratune\.attach or doratune\.load .* before training",
        ),
        (lambda: doratune.verify(merged), r"before doratune\.verify"),
        (lambda: doratune.attach(merged, AdapterConfig(targets=["nothing"])), "matches no module"),
        (lambda: doratune.load(merged, tmp_path / "other"), "was trained on another base"),
    ):
        with pytest.raises(UserError, match=text):
            call()
        assert torch.equal(logits(merged), expected)
    doratune.load(merged, tmp_path / "other", check_base=False)
    assert not torch.equal(logits(merged), expected)
    doratune.detach(merged)
    assert torch.equal(logits(merged), expected)
    for forget in (doratune.detach, lambda m: doratune.use(m, None), lambda m: doratune.delete(m, "default")):
        model = randomize(doratune.attach(base(), QV))
        doratune.merge(model, keep="none")
        forget(model)
        assert doratune.names(model) == []
        assert torch.equal(logits(model), expected)
        doratune.attach(model, QV, name="next")
        assert doratune.names(model) == ["next"]


def test_a_part_that_was_merged_for_good(base):
    model = base()
    randomize(doratune.attach(model.model.layers[0], QV))
    doratune.merge(model.model.layers[0], keep="none")
    expected = logits(model)
    doratune.attach(model, QV)
    assert torch.equal(logits(model), expected)


def test_other_adapters_are_not_left_over_other_weights(base):
    model = doratune.attach(randomize(doratune.attach(base(), QV, name="a")), QV, name="b")
    before = logits(model)
    with pytest.raises(UserError, match=r"other adapters \('a'\), which would stand over other weights then"):
        doratune.merge(model, keep="none")
    assert torch.equal(logits(model), before)
    doratune.delete(model, "a")
    doratune.merge(model, keep="none")
    doratune.attach(model, QV, name="a")


def test_the_next_adapter_does_not_name_the_base_that_it_is_not_over(base, base_folder, tmp_path):
    model = randomize(doratune.attach(base(), QV))
    doratune.merge(model, keep="none")
    doratune.attach(model, QV)
    with pytest.warns(UserWarning, match="no folder or hub has this base model"):
        model.save_pretrained(tmp_path / "next")
    assert f'"{base_folder}"' not in (tmp_path / "next" / "adapter_config.json").read_text()
    doratune.detach(model)
    model.save_pretrained(tmp_path / "merged")
    model.config._name_or_path = str(tmp_path / "merged")  # now it is somewhere
    randomize(doratune.attach(model, QV), seed=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "last")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "last").eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)


def test_full_fine_tuning_of_merged_weights(base):
    model = randomize(doratune.attach(base(), QV))
    doratune.merge(model, keep="none")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if "norm" not in n)


@pytest.mark.parametrize("quantized", ["dense", "same"])
def test_of_a_quantized_base(quantized, tmp_path):
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}  # bitsandbytes' blocks
    LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **sizes)).save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = randomize(doratune.attach(AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=nf4).eval(), QV))
    doratune.merge(model, keep="none", quantized=quantized)
    expected = logits(model)
    doratune.attach(model, QV)
    assert torch.equal(logits(model), expected)
    assert [n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n and "magnitude" not in n] == []


def test_a_model_of_ones_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model[0].bias.requires_grad_(False)
    x = torch.randn(4, 6)
    for seed in range(3):
        randomize(doratune.attach(model, AdapterConfig(rank=2)), seed=seed)
        expected = model(x)
        doratune.merge(model, keep="none")
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
