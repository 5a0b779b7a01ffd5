"""`doratune merge` on model folders that hold no causal language model: any class of transformers, models of diffusers."""

import json

import pytest
import torch

import doratune
from doratune import AdapterConfig
from doratune.cli.main import main
from doratune.support.transformers4 import readable_by_both

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
IDS = torch.tensor([[4, 5, 6, 7, 2]])


def bert_classifier():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=60, max_position_embeddings=30, num_labels=3, **SMALL)
    return BertForSequenceClassification(config), {"input_ids": IDS}


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=20, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config), {"input_ids": IDS, "decoder_input_ids": IDS}


def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {f"{s}_{k}": v for s in ("encoder", "decoder") for k, v in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 20))}
    config = BartConfig(vocab_size=60, d_model=16, max_position_embeddings=30, **sizes)
    return BartForConditionalGeneration(config), {"input_ids": IDS, "decoder_input_ids": IDS}


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(image_size=16, patch_size=8, num_labels=4, **SMALL)
    return ViTForImageClassification(config), {"pixel_values": torch.linspace(-1, 1, 768).view(1, 3, 16, 16)}


def wav2vec2():
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        vocab_size=20,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        num_feat_extract_layers=7,
        **SMALL,
    )
    return Wav2Vec2ForCTC(config), {"input_values": torch.linspace(-1, 1, 4000)[None]}


def llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(vocab_size=60, num_key_value_heads=2, max_position_embeddings=30, **SMALL)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **SMALL)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=59)), {"input_ids": IDS}


def unet():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    inputs = {"sample": torch.linspace(-1, 1, 256).view(1, 4, 8, 8), "timestep": torch.tensor([3])}
    return model, inputs | {"encoder_hidden_states": torch.linspace(-1, 1, 60).view(1, 5, 12)}


BUILDS = {build.__name__: build for build in (bert_classifier, t5, bart, vit, wav2vec2, llava, unet)}


def output(model, example):
    with torch.no_grad():
        return next(t for t in model.eval()(**example).values() if torch.is_tensor(t))


def away(model, seed=0):
    with torch.no_grad():
        for i, (_, layer) in enumerate(doratune.adapters(model)):
            generator = torch.Generator().manual_seed(seed + i)
            layer.lora_B.copy_(0.3 * torch.randn(layer.lora_B.shape, generator=generator))
            layer.magnitude.mul_(1.2)
        for p in model.parameters():
            if p.requires_grad and p.dim() == 2 and p.shape[0] < 16:
                p.add_(0.1)
    return model


@pytest.mark.parametrize("name", BUILDS)
def test_merged_folder_says_what_base_and_adapter_say(name, tmp_path, capsys):
    torch.manual_seed(0)
    model, example = BUILDS[name]()
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").write_text("{}")
    doratune.attach(model, AdapterConfig(rank=2))
    away(model)
    expected = output(model, example)
    doratune.save(model, tmp_path / "adapter")
    arguments = ["--model", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]
    assert main(["merge", *arguments]) == 0
    assert "outputs agree to the dtype's floor" in capsys.readouterr().out
    again = type(model).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(output(again, example), expected, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "merged" / "preprocessor_config.json").is_file()
    readable_by_both(tmp_path / "base")
    before, after = (json.loads((tmp_path / where / "config.json").read_text()) for where in ("base", "merged"))
    assert {k for k in before | after if before.get(k) != after.get(k)} <= {"_name_or_path"}


@pytest.mark.parametrize("keep", [True, False], ids=["ours", "a folder that names no class"])
def test_a_new_head_over_a_base_without_one(keep, tmp_path):
    """The result is the classifier that was trained, with its labels; its base folder names no classifier."""
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    base = tmp_path / "base"
    BertModel(BertConfig(vocab_size=60, max_position_embeddings=30, **SMALL)).save_pretrained(base)
    labels = {0: "no", 1: "perhaps", 2: "yes"}
    names = {"id2label": labels, "label2id": {v: k for k, v in labels.items()}}
    model = BertForSequenceClassification.from_pretrained(base, **names)
    doratune.attach(model, AdapterConfig(rank=2))
    expected = output(away(model), {"input_ids": IDS})
    doratune.save(model, tmp_path / "adapter")
    if not keep:  # as PEFT's own folders: the class by its task, the labels by the head's shape
        path = tmp_path / "adapter" / "doratune.json"
        own = json.loads(path.read_text())
        del own["model"]
        path.write_text(json.dumps(own))
        path = tmp_path / "adapter" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": "SEQ_CLS"}))
    arguments = ["--model", str(base), "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]
    assert main(["merge", *arguments]) == 0
    again, info = BertForSequenceClassification.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    torch.testing.assert_close(output(again, {"input_ids": IDS}), expected, rtol=1e-4, atol=1e-5)
    assert len(again.config.id2label) == 3
    assert again.config.architectures == ["BertForSequenceClassification"]
    if keep:
        assert again.config.id2label == labels


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_a_resized_vocabulary(tie, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    base = tmp_path / "base"
    LlamaForCausalLM(LlamaConfig(vocab_size=60, max_position_embeddings=30, tie_word_embeddings=tie, **SMALL)).save_pretrained(base)
    model = LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(64)
    doratune.attach(model, AdapterConfig(rank=2))
    example = {"input_ids": torch.tensor([[4, 63, 60, 7, 2]])}
    expected = output(away(model), example)
    doratune.save(model, tmp_path / "adapter")
    arguments = ["--model", str(base), "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]
    assert main(["merge", *arguments]) == 0
    again = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert again.config.vocab_size == 64
    assert again.config.tie_word_embeddings == tie
    torch.testing.assert_close(output(again, example), expected, rtol=1e-4, atol=1e-5)


def test_shards_of_diffusers(tmp_path):
    torch.manual_seed(0)
    model, example = unet()
    model.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    assert (tmp_path / "base" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    doratune.attach(model, AdapterConfig(rank=2))
    expected = output(away(model), example)
    doratune.save(model, tmp_path / "adapter")
    arguments = ["--model", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]
    assert main(["merge", *arguments]) == 0
    again = type(model).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(output(again, example), expected, rtol=1e-4, atol=1e-5)


def refused(tmp_path, capsys):
    arguments = ["--model", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]
    assert main(["merge", *arguments]) == 2
    assert not (tmp_path / "merged").exists()
    error = capsys.readouterr().err.split("\r")[-1].split("it/s]")[-1]
    assert len(error.strip().splitlines()) == 1
    return error


def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "base")
    doratune.attach(model, AdapterConfig(rank=2))
    doratune.save(model, tmp_path / "adapter")


def test_code_of_its_own_is_refused(tmp_path, capsys):
    saved(bert_classifier()[0], tmp_path)
    path = tmp_path / "base" / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"architectures": ["MyBert"], "auto_map": {"AutoModel": "my.MyBert"}})
    )
    own = tmp_path / "adapter" / "doratune.json"
    own.write_text(json.dumps({k: v for k, v in json.loads(own.read_text()).items() if k != "model"}))
    assert "merge takes model folders of transformers and diffusers" in refused(tmp_path, capsys)


def test_a_pipeline_names_its_models(tmp_path, capsys):
    model, _ = unet()
    saved(model, tmp_path)
    (tmp_path / "base").rename(tmp_path / "unet")
    (tmp_path / "base").mkdir()
    (tmp_path / "unet").rename(tmp_path / "base" / "unet")
    (tmp_path / "base" / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    error = refused(tmp_path, capsys)
    assert "unet" in error
