"""An adapter knows its base by row norms: other dtypes and quantized forms pass, other models and siblings are refused."""

import itertools
import json

import pytest
import storages
import torch
from conftest import randomize, tiny_gpt2, tiny_llama
from safetensors import safe_open
from torch import nn

import doratune
from doratune import UserError
from doratune.adapter.base_norms import GROUPS, MODULES, ROWS, sampled_rows, spread
from doratune.checkpoint.convert import convert
from doratune.cli.main import main

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
IDS = torch.arange(3, 40)[None]
registry = storages._registry


def saved(folder, model=None, **config):
    """A model with an adapter away from its start, saved to the folder."""
    model = tiny_llama() if model is None else model
    doratune.attach(model, doratune.AdapterConfig(**{"rank": 3} | config))
    doratune.save(randomize(model), folder)
    return model


def tuned(model, lr=1e-3, steps=1):
    """A sibling: a few steps of full fine-tuning."""
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def folded(model):
    """A sibling: another adapter merged into it."""
    doratune.attach(model, doratune.AdapterConfig(method="lora", rank=2, targets=["down_proj"]))
    randomize(model, seed=5, scale=0.05)
    doratune.merge(model, keep="none")
    return doratune.detach(model)


def scaled(model):
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(1.001)
    return model


def noised(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 1e-3 * p.std())
    return model


SIBLINGS = {
    "of another seed": lambda: tiny_llama(seed=1),
    "one step on": lambda: tuned(tiny_llama()),
    "one step on, in bf16": lambda: tuned(tiny_llama()).bfloat16(),
    "some steps on, in fp16": lambda: tuned(tiny_llama(), steps=5).half(),
    "with another adapter merged": lambda: folded(tiny_llama()),
    "one weight scaled": lambda: scaled(tiny_llama()),
    "a thousandth of noise": lambda: noised(tiny_llama()),
}


@pytest.mark.parametrize(("trained", "here"), itertools.product(DTYPES, DTYPES))
def test_the_same_base_in_another_dtype_passes(trained, here, tmp_path):
    saved(tmp_path, tiny_llama().to(trained))
    doratune.load(tiny_llama().to(here), tmp_path)
    doratune.load(tiny_llama().to(trained).to(here), tmp_path)  # and through both


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_another_base_is_refused_and_stays_as_it_was(sibling, tmp_path):
    saved(tmp_path)
    model = SIBLINGS[sibling]()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        doratune.load(model, tmp_path)
    message = str(error.value)
    assert "\n" not in message and str(tmp_path) in message and "check_base" in message
    assert any(name in message for name, _ in model.named_modules() if name.endswith("_proj"))
    assert " here and " in message and " there" in message
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert doratune.names(model) == []
    doratune.load(model, tmp_path, check_base=False)
    doratune.save(model, tmp_path / "moved")  # it belongs to that base from now on
    doratune.load(SIBLINGS[sibling](), tmp_path / "moved")
    with pytest.raises(UserError, match="another base"):
        doratune.load(tiny_llama(), tmp_path / "moved")


KINDS = {
    "lora": {"method": "lora"},
    "input axis": {"magnitude_axis": "input"},
    "vera": {"method": "vera"},
    "magnitude alone": {"targets": [], "magnitude_only": ["q_proj", "down_proj"]},
    "one layer": {"targets": ["layers.1.mlp.up_proj"]},
    "embedding": {"targets": ["embed_tokens"]},
    "pissa": {"start": "pissa"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter(kind, tmp_path):
    saved(tmp_path, **KINDS[kind])
    doratune.load(tiny_llama().bfloat16(), tmp_path)
    with pytest.raises(UserError, match="another base"):
        doratune.load(tuned(tiny_llama()), tmp_path)


class Convolutions(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.two = nn.Conv1d(4, 6, 3), nn.Conv2d(6, 20, 3, groups=2)


@pytest.mark.parametrize(
    ("build", "targets"), [(tiny_gpt2, ["c_attn", "c_fc"]), (Convolutions, ["one", "two"])], ids=["Conv1D", "convolutions"]
)
def test_other_layers(build, targets, tmp_path):
    saved(tmp_path, build(), targets=targets, rank=2)
    doratune.load(build().bfloat16(), tmp_path)
    with pytest.raises(UserError, match="another base"):
        doratune.load(build(seed=1), tmp_path)


def test_experts(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    def build(seed=0):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
        return MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=3))

    saved(tmp_path, build(), targets=["gate_up_proj", "down_proj"])
    doratune.load(build(), tmp_path)
    with pytest.raises(UserError, match="another base"):
        doratune.load(build(seed=1), tmp_path)


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("name", [name for name in storages.BASES if "columns" not in name and "half" not in name])
def test_a_quantized_base_and_what_it_was_quantized_from(name, tmp_path):
    """Trained on either, used on either; another model in this storage is refused."""
    quantized = storages.build(name)
    if quantized.layer.in_features != storages.COLUMNS:
        pytest.skip("other columns than the source")

    def build_dense(seed=0, scale=1.0):
        torch.manual_seed(seed)
        model = nn.Sequential()
        model.add_module("layer", storages._source(torch.bfloat16))
        model.layer.weight.data.mul_(scale)
        return model

    saved(tmp_path / "dense", build_dense(), targets=["layer"])
    doratune.load(quantized.model, tmp_path / "dense")
    doratune.save(quantized.model, tmp_path / "quantized")
    doratune.load(build_dense(), tmp_path / "quantized")
    doratune.load(storages.build(name).model, tmp_path / "quantized")
    saved(tmp_path / "other", build_dense(scale=1.3), targets=["layer"])
    with pytest.raises(UserError, match=r"another base.*of rounding"):
        doratune.load(storages.build(name).model, tmp_path / "other")
    with pytest.raises(UserError, match=r"another base.*of rounding"):
        doratune.load(build_dense(scale=1.3), tmp_path / "quantized")


def test_peft_s_own_folders_load_as_before(tmp_path):
    import peft

    torch.manual_seed(0)
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    theirs.save_pretrained(tmp_path)
    doratune.load(tiny_llama(seed=1), tmp_path)


def test_peft_opens_ours(tmp_path):
    import peft

    model = saved(tmp_path, targets=["q_proj", "up_proj"])
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    with torch.no_grad():
        assert torch.allclose(theirs(IDS).logits, model(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("keep", ["cpu", "none"])
def test_saved_while_merged(keep, tmp_path):
    model = saved(tmp_path / "before")
    doratune.merge(model, keep=keep)
    doratune.save(model, tmp_path / "merged")
    doratune.load(tiny_llama(), tmp_path / "merged")
    with pytest.raises(UserError, match="another base"):
        doratune.load(tuned(tiny_llama()), tmp_path / "merged")


def test_a_base_that_is_edited_under_its_adapter_is_the_base(tmp_path):
    model = tiny_llama()
    doratune.attach(model, doratune.AdapterConfig(rank=3))
    scaled(model)
    doratune.save(model, tmp_path)
    doratune.load(scaled(tiny_llama()), tmp_path)
    with pytest.raises(UserError, match="another base"):
        doratune.load(tiny_llama(), tmp_path)


@pytest.mark.parametrize("to", ["peft", "doratune", "kohya", "mlx", "torchtune", "authors"])
def test_conversions_keep_it(to, tmp_path):
    saved(tmp_path / "own", targets=["q_proj", "down_proj"])
    convert(tmp_path / "own", to, tmp_path / "other", model=tiny_llama())
    convert(tmp_path / "other", "peft", tmp_path / "back", model=tiny_llama())
    for folder in ("other", "back"):
        doratune.load(tiny_llama().bfloat16(), tmp_path / folder)
        with pytest.raises(UserError, match="another base"):
            doratune.load(tuned(tiny_llama()), tmp_path / folder)


@pytest.mark.parametrize(
    "record", ["x", 3, [], {"model.layers.0.self_attn.q_proj": 1}, {"a": {"precision": "float7", "columns": 1, "rows": 1}}]
)
def test_a_record_that_says_something_else(record, tmp_path):
    saved(tmp_path)
    own = tmp_path / "doratune.json"
    own.write_text(json.dumps(json.loads(own.read_text()) | {"base_norms": record}))
    with pytest.raises(UserError, match="base_norms") as error:
        doratune.load(tiny_llama(), tmp_path)
    assert "\n" not in str(error.value)
    doratune.load(tiny_llama(), tmp_path, check_base=False)


def test_what_it_costs(tmp_path):
    """Whatever the size of the model: some rows of some modules."""
    assert max(sum(map(len, sampled_rows(count))) for count in (1, 15, 16, 17, 511, 513, 151_936)) <= GROUPS * ROWS
    assert all(len(spread(count)) == min(count, MODULES) for count in (1, 7, 8, 9, 210))
    assert {0, 209} <= spread(210)
    saved(tmp_path, tiny_llama(layers=6))
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert set(file.metadata()) == {"format", "doratune_fingerprint"}
    assert len(json.loads((tmp_path / "doratune.json").read_text())["base_norms"]) == MODULES


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny_folder, tiny_tokenizer):
    """An adapter of the tiny folder, a fine-tuned sibling of that folder, prompts and a task."""
    root = tmp_path_factory.mktemp("base_check")
    from transformers import AutoModelForCausalLM

    saved(root / "adapter", AutoModelForCausalLM.from_pretrained(tiny_folder))
    tuned(AutoModelForCausalLM.from_pretrained(tiny_folder)).save_pretrained(root / "sibling")
    tiny_tokenizer.save_pretrained(root / "sibling")
    (root / "task.json").write_text(
        json.dumps([{"instruction": "true or false?", "output": "the correct answer is true", "answer": "true"}] * 2)
    )
    return root


COMMANDS = {
    "merge": "merge --check false --output OUT",
    "merge, with its comparison": "merge --output OUT",
    "evaluate": "evaluate --task TASK --protocol likelihood --output OUT",
    "generate": "generate --prompt true --max_new_tokens 2",
    "inspect": "inspect",
    "export gguf": "export --to gguf --output OUT",
    "export lora": "export --to lora --rank 2 --output OUT",
    "export lora-scale": "export --to lora-scale --output OUT",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_it_unless_told(command, places, tiny_folder, tmp_path, capsys):
    words = COMMANDS[command].replace("OUT", str(tmp_path / "out")).replace("TASK", str(places / "task.json")).split()
    words += ["--adapter", str(places / "adapter")]
    assert main([*words, "--model", str(places / "sibling")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"doratune {words[0]}: ") and "another base" in error and "check_base" in error
    assert not (tmp_path / "out").exists()
    assert main([*words, "--model", str(places / "sibling"), "--check_base", "false"]) == 0
    assert main([*words, "--model", str(tiny_folder), *(["--overwrite"] if "--output" in words else [])]) == 0


def test_chat_refuses_it_when_it_is_used(places, monkeypatch, capsys):
    words = ["chat", "--adapter", str(places / "adapter"), "--model", str(places / "sibling"), "--max_new_tokens", "2"]
    assert main(words) == 2
    assert "another base" in capsys.readouterr().err


def test_analyze_refuses_it_unless_told(places, tmp_path, capsys):
    words = ["analyze", str(places / "adapter"), "--model", str(places / "sibling"), "--output", str(tmp_path / "out")]
    assert main(words) == 2
    assert "another base" in capsys.readouterr().err
    assert main([*words, "--check_base", "false"]) == 0


def test_a_run_is_not_resumed_on_another_base(places, tiny_folder, tiny_tokenizer, tmp_path, capsys):
    """The folder behind the same name holds another model now."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_folder).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"instruction": f"is {i} even?", "output": "the correct answer is true"} for i in range(16)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    words = ["train", "--model", str(tmp_path / "base"), "--data", str(tmp_path / "data.json"), "--output", str(tmp_path / "run")]
    words += ["--schedule", "constant", "--batch_size", "4", "--rank", "2", "--tensorboard", "false", "--dtype", "float32"]
    assert main([*words, "--max_steps", "2"]) == 0
    AutoModelForCausalLM.from_pretrained(places / "sibling").save_pretrained(tmp_path / "base")
    assert main([*words, "--max_steps", "4", "--resume"]) == 2
    assert "another base" in capsys.readouterr().err
    assert main([*words, "--max_steps", "4", "--resume", "--check_base", "false"]) == 0
