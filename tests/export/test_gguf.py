"""GGUF files: read back by transformers, run by llama.cpp, for every family; whole or absent; what is refused."""

import json
import subprocess
import sys

import llama_cpp
import pytest
import torch
from conftest import randomize
from engines import engine

import doratune
from doratune import UserError
from doratune.export.gguf import export_gguf

PROMPT = [5, 17, 240, 33, 8, 99, 150, 61, 7, 201, 44, 180, 12, 290, 77, 130, 66, 9]
SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "llama": ("Llama", {"num_hidden_layers": 2}),
    "llama tied": ("Llama", {"num_hidden_layers": 2, "tie_word_embeddings": True, "head_dim": 32}),
    "llama biases": ("Llama", {"num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True}),
    "llama 3 rope": ("Llama", {"num_hidden_layers": 2, "rope_parameters": LLAMA3}),
    "llama linear rope": (
        "Llama", {"num_hidden_layers": 2, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}}
    ),
    "llama yarn": (
        "Llama",
        {
            "num_hidden_layers": 2,
            "rope_parameters": {
                "rope_type": "yarn", "factor": 4.0, "rope_theta": 100.0, "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral": ("Mistral", {"num_hidden_layers": 2, "sliding_window": None}),
    "qwen2": ("Qwen2", {"num_hidden_layers": 2, "vocab_size": 320}),
    "qwen3": ("Qwen3", {"num_hidden_layers": 2, "head_dim": 128}),
    "gemma2": ("Gemma2", {"num_hidden_layers": 4, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}),
    "gemma3": ("Gemma3", {"num_hidden_layers": 7, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}),
}  # fmt: skip
ONLY_THERE = ("llama biases", "llama 3 rope", "llama linear rope", "llama yarn", "gemma2", "gemma3")
"""transformers' reader of GGUF does not take these over (biases of Llama, scaled rotation, windows and caps); llama.cpp does."""


def tiny(family: str, tokenizer, folder):
    """A tiny model of a family, every parameter at random, as a folder; returns the model."""
    import transformers

    name, more = FAMILIES[family]
    kind = f"{name}TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, kind)(**SIZES | more)
    torch.manual_seed(3)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.3 if p.dim() == 1 else 0.1))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def adapted(model, folder):
    """The model with a DoRA adapter away from its start, saved to the folder."""
    doratune.attach(model, doratune.AdapterConfig(rank=4, targets=["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]))
    randomize(model, scale=0.1)
    doratune.save(model, folder)
    return model


@torch.no_grad()
def last_logits(model):
    return model(input_ids=torch.tensor([PROMPT])).logits[0, -1]


@pytest.fixture(params=FAMILIES)
def exported(request, tmp_path, tiny_tokenizer):
    """(family, logits of base + adapter, the file)."""
    model = tiny(request.param, tiny_tokenizer, tmp_path / "base")
    adapted(model, tmp_path / "adapter")
    export = export_gguf(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "out", type="f32")
    return request.param, last_logits(model), export.file


def test_transformers_reads_it_back(exported):
    from transformers import AutoModelForCausalLM

    family, logits, file = exported
    if family in ONLY_THERE:
        pytest.skip("transformers does not take this over from GGUF")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    assert (last_logits(model) - logits).abs().max() <= 2e-5 * logits.abs().max()


def test_llama_cpp_computes_the_same(exported):
    engine("xllamacpp")
    _, logits, file = exported
    body = {"prompt": PROMPT, "n_predict": 1, "temperature": 0, "n_probs": len(logits), "cache_prompt": False}
    answer = llama_cpp.ask(file, ("/completion", body))[0]
    theirs = torch.tensor(llama_cpp.distribution(answer, len(logits)))
    assert (theirs - logits.log_softmax(-1)).abs().max() < 2e-3


@pytest.mark.parametrize(("type", "tolerance"), [("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 3e-2)])
def test_precision_of_each_type(type, tolerance, tmp_path, tiny_folder):
    from transformers import AutoModelForCausalLM

    model = adapted(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "adapter")
    file = export_gguf(str(tiny_folder), tmp_path / "adapter", tmp_path / "out", type).file
    back = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    logits = last_logits(model)
    assert 1e-6 < (last_logits(back) - logits).norm() / logits.norm() < tolerance


def test_an_ordinary_model_folder(tmp_path, tiny_folder):
    from transformers import AutoModelForCausalLM

    file = export_gguf(str(tiny_folder), None, tmp_path / "out", "f32").file
    back = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    expected = last_logits(AutoModelForCausalLM.from_pretrained(tiny_folder))
    assert torch.allclose(last_logits(back), expected, atol=1e-5)


def test_shard_by_shard_is_the_same_file(tmp_path, tiny_folder, tiny_tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    tiny_tokenizer.save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    adapted(model, tmp_path / "adapter")
    files = [
        export_gguf(str(base), tmp_path / "adapter", tmp_path / name / "out", "f16").file
        for base, name in ((tiny_folder, "a"), (tmp_path / "sharded", "b"))
    ]
    from gguf import GGUFReader

    one, other = ({t.name: t.data.tobytes() for t in GGUFReader(file).tensors} for file in files)
    assert one == other and len(one) == 21


def test_embeddings_trained_whole_untie_the_head(tmp_path, tiny_tokenizer):
    from transformers import AutoModelForCausalLM

    model = tiny("llama tied", tiny_tokenizer, tmp_path / "base")
    doratune.attach(model, doratune.AdapterConfig(rank=4, targets=["q_proj"], also_train=("embed_tokens",)))
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(torch.randn_like(model.model.embed_tokens.weight))
    doratune.save(randomize(model), tmp_path / "adapter")
    file = export_gguf(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "out", "f32").file
    from doratune.support.models import load_model

    reference = doratune.load(load_model(str(tmp_path / "base")), tmp_path / "adapter")
    back = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    assert torch.allclose(last_logits(back), last_logits(reference), atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "phi"])
def test_other_architectures_are_refused(family, tmp_path, tiny_tokenizer):
    import transformers

    if family == "gpt2":
        config = transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2)
    else:
        config = transformers.PhiConfig(**SIZES, num_hidden_layers=1)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"LlamaForCausalLM, MistralForCausalLM.*Gemma3"):
        export_gguf(str(tmp_path / "base"), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "setting", "value"),
    [
        ("llama", "hidden_act", "gelu"),
        ("qwen3", "attention_bias", True),
        ("gemma3", "query_pre_attn_scalar", 100),
        ("gemma2", "layer_types", ["full_attention"] * 4),
        ("llama", "rope_parameters", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}),
        ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}),
    ],
)
def test_settings_that_its_graph_lacks_are_refused(family, setting, value, tmp_path, tiny_tokenizer):
    tiny(family, tiny_tokenizer, tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))
    with pytest.raises(UserError, match=r"which llama\.cpp does not compute"):
        export_gguf(str(tmp_path / "base"), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", ["type", "file", "exists", "range", "nan"])
def test_nothing_is_half_written(bad, tmp_path, tiny_folder, tiny_tokenizer):
    base, output, type = tiny_folder, tmp_path / "out", "f16"
    if bad == "type":
        type = "q4_k"
    elif bad == "file":
        output = tmp_path / "out.gguf"
    elif bad == "exists":
        output.mkdir()
        (output / "mine").write_text("mine")
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(tiny_folder)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e6 if bad == "range" else float("nan")
        base = tmp_path / "base"
        model.save_pretrained(base)
        tiny_tokenizer.save_pretrained(base)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(UserError):
        export_gguf(str(base), None, output, type)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert bad != "exists" or (output / "mine").read_text() == "mine"


@pytest.mark.parametrize("to", ["gguf", "lora-scale", "lora"])
def test_an_adapter_of_a_quantized_base_has_its_merged_model_exported(to, tmp_path, tiny_folder, capsys):
    """Its W is the rounded one, which the base's folder does not hold."""
    from doratune.cli.main import main

    adapted(transformers_model(tiny_folder), tmp_path / "adapter")
    own = tmp_path / "adapter" / "doratune.json"
    own.write_text(
        json.dumps(json.loads(own.read_text()) | {"quantization": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    )
    words = ["--to", to, "--model", str(tiny_folder), "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "out")]
    assert main(["export", *words, *(["--rank", "2"] if to == "lora" else [])]) == 2
    assert "doratune merge --adapter" in capsys.readouterr().err and not (tmp_path / "out").exists()


def transformers_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def test_memory_is_that_of_a_few_tensors(tmp_path, tiny_tokenizer):
    """300 MB in fp32, the largest tensor of 8 MB: the process that exports it grows by far less."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(**SIZES | sizes | {"num_key_value_heads": 8}))
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    doratune.attach(model, doratune.AdapterConfig(rank=2))
    doratune.save(model, tmp_path / "adapter")
    total = (tmp_path / "base" / "model.safetensors").stat().st_size
    assert total > 300 * 2**20
    code = (
        "import gguf, resource, sys, transformers.models.llama.modeling_llama\n"
        "from doratune.export.gguf import export_gguf\n"
        "from doratune.export.weights import Weights\n"
        "Weights(*sys.argv[1:3])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "export_gguf(*sys.argv[1:], 'q8_0')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    folders = [str(tmp_path / name) for name in ("base", "adapter", "out")]
    run = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True)
    assert int(run.stdout.split()[-1]) * (1 if sys.platform == "darwin" else 1024) < total / 3


QUESTIONS = ("What is the capital of France?", "Name three colours.", "Repeat after me: one two three four five six.")


def greedy(model, ids) -> tuple[list[int], list[float]]:
    """(new tokens, by how much the best logit leads at each)."""
    out = model.generate(
        **ids, max_new_tokens=32, do_sample=False, output_logits=True, return_dict_in_generate=True, repetition_penalty=1.0
    )
    leads = [(top[0] - top[1]).item() for top in (step[0].topk(2).values for step in out.logits)]
    return out.sequences[0, ids["input_ids"].shape[1] :].tolist(), leads


def test_the_real_model_says_the_same_in_llama_cpp(tmp_path, smollm2):
    """Greedy text of base + adapter here and of the file there: all of it in f16; in q8_0, whose rounding moves logits by some
    tenths, up to the first token that leads by less than 1. The tokens and the rendered chat besides."""
    engine("xllamacpp")
    from doratune.support.models import load_model, load_tokenizer

    model, tokenizer = load_model(smollm2), load_tokenizer(smollm2)
    doratune.attach(model, doratune.AdapterConfig(rank=8, targets=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]))
    randomize(model, scale=0.003)
    doratune.save(model, tmp_path / "adapter")
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    settings = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    expected = [greedy(model, tokenizer.apply_chat_template(chat, **settings)) for chat in chats]
    text = "Hello  world 123\n\n Éé 日本語 🚀 isn't"
    for type in ("f16", "q8_0"):
        file = export_gguf(smollm2, tmp_path / "adapter", tmp_path / type, type).file
        *answers, tokens, prompt = llama_cpp.ask(
            file,
            *(("/v1/chat/completions", {"messages": chat, "max_tokens": 32, "temperature": 0}) for chat in chats),
            ("/tokenize", {"content": text, "add_special": True}),
            ("/apply-template", {"messages": chats[0]}),
        )
        for answer, (ids, leads) in zip(answers, expected, strict=True):
            sure = next((i for i, lead in enumerate(leads) if lead < 1), len(leads)) if type == "q8_0" else len(leads)
            assert answer["choices"][0]["message"]["content"].startswith(tokenizer.decode(ids[:sure], skip_special_tokens=True))
        assert tokens["tokens"] == tokenizer(text)["input_ids"]
        assert prompt["prompt"] == tokenizer.apply_chat_template(chats[0], tokenize=False, add_generation_prompt=True)
