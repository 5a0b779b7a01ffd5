"""Our PEFT folders where users open them: transformers' load_adapter and from_pretrained, PEFT's own, sentence-transformers."""

import pytest
import torch
from conftest import randomize, tiny_llama
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import doratune

IDS = torch.arange(3, 40)[None]
CLOSE = {"rtol": 2e-6, "atol": 2e-6}
ADAPTERS = {
    "dora": {},
    "lora": {"method": "lora"},
    "ranks and alphas": {"rank_overrides": {"q_proj": 2, "layers.1.mlp.up_proj": 5}, "alpha_overrides": {"v_proj": 7.0}},
    "rslora": {"rank_scaling": "rslora"},
    "magnitude alone": {"targets": ["q_proj", "up_proj"], "magnitude_only": ["v_proj"]},
    "a regex": {"targets": r".*layers\.1\..*_proj"},
    "excluded": {"exclude": ["layers.0.mlp.down_proj"]},
    "pissa": {"start": "pissa"},
    "a head trained whole": {"targets": ["q_proj"], "also_train": ["lm_head"]},
    "embedding": {"targets": ["embed_tokens", "q_proj"], "embedding_magnitude": "dimension"},
}


@pytest.fixture(params=ADAPTERS)
def ours(request, tmp_path, tiny_folder):
    """(adapter folder, logits with it) of the tiny model, away from its start."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    doratune.attach(model, doratune.AdapterConfig(**{"rank": 3} | ADAPTERS[request.param]))
    randomize(model)
    if "also_train" in ADAPTERS[request.param]:
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
    doratune.save(model, tmp_path / "adapter", format="peft")
    return tmp_path / "adapter", logits(model), request.param


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def test_transformers_load_adapter(ours, tiny_folder):
    folder, expected, _ = ours
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.load_adapter(str(folder))
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    assert (expected - logits(tiny_llama())).abs().max() > 1e-3


def test_transformers_from_pretrained_of_the_adapter_s_folder(ours):
    """The base is the one that the folder records."""
    folder, expected, _ = ours
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), expected, **CLOSE)


def test_peft(ours, tiny_folder):
    import peft

    folder, expected, _ = ours
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), folder)
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(auto), expected, **CLOSE)


@pytest.mark.parametrize("settings", [{}, {"method": "lora"}, {"targets": ["q_proj"], "magnitude_only": ["v_proj"]}])
def test_sentence_transformers(settings, tmp_path, tiny_folder):
    """As a model of its own by the folder's name, and put on a model that is there."""
    sentences = pytest.importorskip("sentence_transformers")
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    texts = ["the correct answer", "true false option1", "ending4"]

    def around(path):
        word = Transformer(str(path))
        return sentences.SentenceTransformer(modules=[word, Pooling(word.get_embedding_dimension())], device="cpu")

    reference = around(tiny_folder)
    before = reference.encode(texts, convert_to_tensor=True)
    inner = reference[0].auto_model
    doratune.attach(inner, doratune.AdapterConfig(**{"rank": 3} | settings))
    doratune.save(randomize(inner), tmp_path / "adapter", format="peft")
    expected = reference.encode(texts, convert_to_tensor=True)
    assert (expected - before).abs().max() > 1e-3
    later = around(tiny_folder)
    later.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(later.encode(texts, convert_to_tensor=True), expected, **CLOSE)
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(around(tmp_path / "adapter").encode(texts, convert_to_tensor=True), expected, **CLOSE)


@pytest.mark.parametrize("build", [AutoModel, AutoModelForSequenceClassification])
def test_other_classes_of_transformers(build, tmp_path, tiny_folder):
    """An encoder, and a classifier whose new head is trained whole (which PEFT loads, and transformers' load_adapter does not)."""
    import peft

    torch.manual_seed(0)
    extra = {"num_labels": 3} if build is AutoModelForSequenceClassification else {}
    model = build.from_pretrained(tiny_folder, **extra)
    doratune.attach(model, doratune.AdapterConfig(rank=3))
    doratune.save(randomize(model), tmp_path, format="peft")
    other = build.from_pretrained(tiny_folder, **extra)
    other = peft.PeftModel.from_pretrained(other, tmp_path) if extra else other
    if not extra:
        other.load_adapter(str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(input_ids=IDS)[0], model.eval()(input_ids=IDS)[0], **CLOSE)
