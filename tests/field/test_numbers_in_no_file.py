"""Parameters that were drawn at random when the model was loaded, or grew with the vocabulary: trained whole, saved, and said."""

import copy

import pytest
import torch
from pictures import FAMILIES, FURTHER

import doratune
from doratune import AdapterConfig

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
IDS = {"input_ids": torch.tensor([[4, 5, 6, 7, 2]])}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 768).view(1, 3, 16, 16)}


def bert(folder):
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(vocab_size=60, max_position_embeddings=30, **SMALL)).save_pretrained(folder)
    return folder


def llama(folder, tie=False):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(vocab_size=60, max_position_embeddings=30, tie_word_embeddings=tie, pad_token_id=0, **SMALL)
    ).save_pretrained(folder)
    return folder


def vit(folder):
    from transformers import ViTConfig, ViTModel

    ViTModel(ViTConfig(image_size=16, patch_size=8, **SMALL)).save_pretrained(folder)
    return folder


HEADS = {
    "BertForSequenceClassification": (bert, ["classifier"], IDS),
    "BertForTokenClassification": (bert, ["classifier"], IDS),
    "BertForQuestionAnswering": (bert, ["qa_outputs"], IDS),
    "BertForMultipleChoice": (bert, ["classifier"], {"input_ids": IDS["input_ids"][None]}),
    "LlamaForSequenceClassification": (llama, ["score"], IDS),
    "ViTForImageClassification": (vit, ["classifier"], PIXELS),
}


def loaded(name, folder, seed, **settings):
    import transformers

    torch.manual_seed(seed)
    return getattr(transformers, name).from_pretrained(folder, **settings).eval()


def outputs(model, example):
    with torch.no_grad():
        out = model(**example)
    return [value for key, value in out.items() if torch.is_tensor(value) and value.is_floating_point()]


def moved(model):
    """Some steps of training: everything trainable moves."""
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return model


@pytest.mark.parametrize("name", HEADS)
def test_a_new_head_is_trained_whole_and_comes_back(name, tmp_path):
    build, heads, example = HEADS[name]
    base = build(tmp_path / "base")
    model = loaded(name, base, seed=1)
    doratune.attach(model, AdapterConfig(rank=2))
    report = doratune.verify(model)
    for head in heads:
        assert f"{head}: newly initialized, trained whole and saved" in str(report)
        assert f"trained whole: {head}: newly initialized" in str(doratune.inspect(model))
        assert all(p.requires_grad for p in model.get_submodule(head).parameters())
    moved(model)
    doratune.save(model, tmp_path / "adapter")
    again = loaded(name, base, seed=2)
    doratune.load(again, tmp_path / "adapter")
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, example), outputs(again, example), strict=True))


@pytest.mark.parametrize("tie", [False, True], ids=["own head", "tied head"])
def test_a_resized_vocabulary_is_saved_whole(tie, tmp_path):
    base = llama(tmp_path / "base", tie)
    model = loaded("LlamaForCausalLM", base, seed=1)
    torch.manual_seed(3)
    model.resize_token_embeddings(64, mean_resizing=False)
    doratune.attach(model, AdapterConfig(rank=2))
    assert "model.embed_tokens: resized from 60 to 64 rows" in str(doratune.verify(model))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    moved(model)
    doratune.save(model, tmp_path / "adapter")
    again = loaded("LlamaForCausalLM", base, seed=2)
    again.resize_token_embeddings(64)
    doratune.load(again, tmp_path / "adapter")
    new = {"input_ids": torch.tensor([[4, 63, 60, 7, 2]])}
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, new), outputs(again, new), strict=True))


def test_a_resized_vocabulary_says_how_to_load_it(tmp_path):
    base = llama(tmp_path / "base")
    model = loaded("LlamaForCausalLM", base, seed=1)
    model.resize_token_embeddings(64)
    doratune.attach(model, AdapterConfig(rank=2))
    doratune.save(model, tmp_path / "adapter")
    with pytest.raises(doratune.UserError, match=r"resize_token_embeddings\(64\)"):
        doratune.load(loaded("LlamaForCausalLM", base, seed=2), tmp_path / "adapter")


def test_a_head_that_was_chosen_is_trained_whole_instead(tmp_path):
    """Adapted, its random base would be in no file."""
    model = loaded("BertForSequenceClassification", bert(tmp_path / "base"), seed=1)
    doratune.attach(model, AdapterConfig(rank=2, targets=["query", "classifier"]))
    assert "classifier" not in dict(doratune.adapters(model))
    assert doratune.verify(model).left_out["classifier"] == "trained whole (also_train)"


def test_left_frozen_it_is_a_problem_and_load_names_it(tmp_path):
    base = bert(tmp_path / "base")
    model = loaded("BertForSequenceClassification", base, seed=1)
    doratune.attach(model, AdapterConfig(rank=2, newly_initialized="freeze"))
    assert "in no file, and not trained: classifier.weight (newly initialized)" in str(doratune.verify(model))
    doratune.save(model, tmp_path / "adapter")
    with pytest.warns(UserWarning, match=r"does not hold classifier\.weight \(newly initialized\), classifier\.bias"):
        doratune.load(loaded("BertForSequenceClassification", base, seed=2), tmp_path / "adapter")


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "ViTForImageClassification"])
def test_a_copy_without_marks_is_compared_with_its_files(name, tmp_path):
    """A ViT's files have older names than its modules."""
    model = copy.deepcopy(loaded(name, HEADS[name][0](tmp_path / "base"), seed=1))
    assert not any(hasattr(p, "_is_hf_initialized") for p in model.parameters())
    doratune.attach(model, AdapterConfig(rank=2))
    assert "\nclassifier: newly initialized" in str(doratune.verify(model))


def test_experts_that_are_stored_one_by_one_are_not_new(tmp_path):
    """The files hold each expert, the model one tensor of all."""
    from transformers import MixtralConfig, MixtralForCausalLM

    MixtralForCausalLM(
        MixtralConfig(vocab_size=60, num_local_experts=4, num_key_value_heads=2, max_position_embeddings=30, **SMALL)
    ).save_pretrained(tmp_path / "base")
    model = loaded("MixtralForCausalLM", tmp_path / "base", seed=1)
    for one in (copy.deepcopy(model), model):
        doratune.attach(one, AdapterConfig(rank=2))
        assert "newly initialized" not in str(doratune.verify(one))


@pytest.mark.parametrize("four_bits", [True, False], ids=["nf4", "int8"])
def test_a_new_head_over_a_quantized_base(four_bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    quantized = BitsAndBytesConfig(load_in_4bit=four_bits, load_in_8bit=not four_bits)
    model = loaded("LlamaForSequenceClassification", llama(tmp_path / "base"), seed=1, quantization_config=quantized)
    doratune.attach(model, AdapterConfig(rank=2))
    assert doratune.verify(model).problems == []
    assert [name for name, p in model.named_parameters() if p.requires_grad and "score" in name] == ["score.weight"]


def test_what_was_saved_is_not_new(tmp_path):
    """A model with its head, one from a config, one that was cast and moved: nothing to say."""
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(vocab_size=60, max_position_embeddings=30, **SMALL))
    model.save_pretrained(tmp_path / "whole")
    for one in (model, loaded("BertForSequenceClassification", tmp_path / "whole", seed=1).to(torch.bfloat16)):
        doratune.attach(one, AdapterConfig(rank=2))
        report = doratune.verify(one)
        assert report.ok
        assert "newly initialized" not in str(report)
        assert "classifier" in dict(doratune.adapters(one))


def test_detach_gives_the_head_back(tmp_path):
    model = loaded("BertForSequenceClassification", bert(tmp_path / "base"), seed=1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    doratune.attach(model, AdapterConfig(rank=2))
    moved(model)
    doratune.detach(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    doratune.attach(model, AdapterConfig(rank=2))
    assert "classifier: newly initialized" in str(doratune.verify(model))


def of_parts(kind, folder):
    """The folder of a model made of parts, whose vocabulary grew by four before it was saved: its config says where
    each part's came from. Returns (it, rows)."""
    from transformers import AutoConfig, VisionEncoderDecoderModel

    parts = folder / "parts"
    if kind == "vision-encoder-decoder":
        pieces = str(vit(parts / "tower")), str(decoder(parts / "language"))
        model = VisionEncoderDecoderModel.from_encoder_decoder_pretrained(*pieces)
        language = model.decoder
        language.resize_token_embeddings(64)
    else:
        model, _ = (FAMILIES | FURTHER)[kind]()
        language = model.get_decoder()
        language.save_pretrained(parts)
        model.config.text_config = AutoConfig.from_pretrained(parts)
        assert model.config.text_config._name_or_path == str(parts)
        model.resize_token_embeddings(len(language.get_input_embeddings().weight) + 4)
    model.save_pretrained(folder / "whole")
    return folder / "whole", len(language.get_input_embeddings().weight)


def decoder(folder):
    from transformers import BertConfig, BertLMHeadModel

    BertLMHeadModel(BertConfig(vocab_size=60, is_decoder=True, add_cross_attention=True, **SMALL)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("copied", [False, True], ids=["loaded", "copied"])
@pytest.mark.parametrize("kind", [*FAMILIES, *FURTHER, "vision-encoder-decoder"])
def test_a_model_of_parts_is_judged_by_its_own_files(kind, copied, tmp_path):
    """Not by those that a part was once made of; what it lacks itself is still said."""
    import transformers

    folder, rows = of_parts(kind, tmp_path)
    auto = transformers.VisionEncoderDecoderModel if "decoder" in kind else transformers.AutoModelForImageTextToText
    model = auto.from_pretrained(folder)
    assert list((tmp_path / "parts").glob("**/*.safetensors"))
    report = doratune.inspect(doratune.attach(copy.deepcopy(model) if copied else model, AdapterConfig(rank=2)))
    assert "trained whole" not in str(report)
    grown = auto.from_pretrained(folder)
    (grown.decoder if "decoder" in kind else grown).resize_token_embeddings(rows + 3)
    report = str(doratune.inspect(doratune.attach(copy.deepcopy(grown) if copied else grown, AdapterConfig(rank=2))))
    assert f"resized from {rows} to {rows + 3} rows" in report
