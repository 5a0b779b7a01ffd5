"""What users do that is refused: (kind, situation, a real call on a small model), and what is said then, for docs/support.md."""

import json
import tempfile
import warnings
from pathlib import Path

import torch
from conftest import tiny_llama
from torch import nn

import doratune
from doratune.cli.arguments import parse
from doratune.cli.merge import MergeSettings
from doratune.errors import UserError

SMALL = doratune.AdapterConfig(rank=2, targets=["q_proj"])


def attached(**settings):
    return doratune.attach(tiny_llama(layers=1), doratune.AdapterConfig(**{"rank": 2, "targets": ["q_proj"]} | settings))


def saved(folder: Path, **settings) -> Path:
    doratune.save(attached(**settings), folder / "adapter")
    return folder / "adapter"


def edited(folder: Path, **fields) -> Path:
    """A saved adapter whose adapter_config.json says something else."""
    adapter = saved(folder)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return adapter


def with_tensors(folder: Path, change) -> Path:
    from safetensors.torch import load_file, save_file

    adapter = saved(folder)
    path = adapter / "adapter_model.safetensors"
    save_file({key: change(key, t) for key, t in load_file(path).items()}, path)
    return adapter


def tied():
    return doratune.attach(tiny_llama(tie=True), doratune.AdapterConfig(rank=2, targets=["lm_head"]))


def under_peft():
    from peft import LoraConfig, get_peft_model

    return doratune.attach(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])), SMALL)


def over_ours():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(attached(), LoraConfig(target_modules=["q_proj"]))


def prompts_over():
    from peft import PromptTuningConfig, get_peft_model

    return get_peft_model(attached(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def for_good(model):
    doratune.merge(model, keep="none")
    return model


def two():
    return doratune.attach(doratune.attach(tiny_llama(layers=1), SMALL, name="a"), SMALL, name="b")


def normed():
    model = attached()
    nn.utils.parametrizations.weight_norm(model.model.layers[0].self_attn.q_proj)
    doratune.merge(model)


def base_alone(folder):
    """An attached whole that holds a transformers model: its own save_pretrained knows nothing of the adapter."""
    whole = nn.ModuleDict({"inner": tiny_llama(layers=1)})
    doratune.attach(whole, SMALL)
    whole["inner"].save_pretrained(folder / "inner")


def combined_whole():
    return doratune.combine(attached(also_train=["lm_head"]), {"default": 1}, "c")


REFUSALS = [
    ("selection", "a target that names nothing", lambda f: attached(targets=["q_prj"])),
    ("selection", "a rank larger than the layer", lambda f: attached(rank=64)),
    ("selection", "a weight that is tied to another", lambda f: tied()),
    ("selection", "a layer that is not there", lambda f: attached(layers=[3])),
    ("settings", "PEFT's name of one", lambda f: doratune.AdapterConfig.from_dict({"target_modules": ["q_proj"]})),
    ("settings", "a number out of its range", lambda f: attached(rank=0)),
    ("settings", "a choice that is none", lambda f: attached(magnitude_axis="inputs")),
    ("settings", "on the command line", lambda f: parse(MergeSettings, ["--into", "gguf"], "merge", "")),
    ("states", "attaching twice", lambda f: doratune.attach(attached(), SMALL)),
    ("states", "training a merged model", lambda f: doratune.parameter_groups((lambda m: (doratune.merge(m), m)[1])(attached()))),
    ("states", "training what was merged for good", lambda f: doratune.parameter_groups(for_good(attached()))),
    ("states", "merging for good beside other adapters", lambda f: for_good(two())),
    ("states", "an adapter that is not there", lambda f: doratune.use(attached(), "other")),
    ("other packages", "attaching over PEFT's adapters", lambda f: under_peft()),
    ("other packages", "PEFT's adapters over attached layers", lambda f: over_ours()),
    ("other packages", "PEFT's prompts over an attached model", lambda f: prompts_over()),
    ("other packages", "a weight norm on an adapted layer, then merge", lambda f: normed()),
    ("saving", "the base alone, by the inner model's save_pretrained", base_alone),
    ("files", "a folder that is none", lambda f: doratune.load(tiny_llama(), f / "nothing")),
    ("files", "another model's adapter", lambda f: doratune.load(tiny_llama(), edited(f, target_modules=["k_proj"]))),
    ("files", "a factor in int8", lambda f: doratune.load(tiny_llama(layers=1), with_tensors(f, lambda k, t: t.to(torch.int8)))),
    ("files", "a factor that is not finite", lambda f: doratune.load(tiny_llama(layers=1), with_tensors(f, lambda k, t: t / 0))),
    ("files", "a start that changed the base", lambda f: doratune.load(tiny_llama(layers=1), edited(f, init_lora_weights="pissa"))),
    ("files", "a setting that is not known", lambda f: doratune.load(tiny_llama(layers=1), edited(f, use_qalora=True))),
    (
        "combining",
        "an adapter that trains whole modules",
        lambda f: doratune.combine(attached(also_train=["lm_head"]), {"default": 1}, "c"),
    ),
]


def message(call) -> str:
    """What the call says when it is refused, without the folder of this run."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call(Path(folder))
        except UserError as error:
            return " ".join(str(error).split()).replace(folder, "FOLDER")
    return ""
