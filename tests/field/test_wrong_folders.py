"""Adapter folders with numbers, names or patterns that no adapter has: refused in one line, in time, the model untouched."""

import json
import time

import pytest
import torch
from conftest import one_layer, randomize, tiny_llama
from safetensors.torch import load_file, save_file
from torch import nn

import doratune
from doratune import AdapterConfig
from doratune.errors import UserError

IDS = torch.arange(3, 15)[None]
TENSORS, CONFIG, OWN, STARTS = "adapter_model.safetensors", "adapter_config.json", "doratune.json", "doratune_starts.safetensors"


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def folder(tmp_path):
    model = randomize(doratune.attach(tiny_llama(), AdapterConfig(rank=4, targets=["q_proj", "o_proj"], also_train=["norm"])))
    doratune.save(model, tmp_path)
    return tmp_path


def relative_folder(tmp_path):
    config = AdapterConfig(rank=4, targets=["q_proj"], magnitude_form="relative")
    model = doratune.attach(tiny_llama(), config)
    doratune.save(model, tmp_path)
    return tmp_path


def change(path, **tensors):
    """Replace tensors of a file; `part`: the end of a key → its new value, or a function of the old one."""
    held = load_file(path)
    for part, value in tensors.items():
        key = next(key for key in sorted(held) if part in key)
        held[key] = (value(held[key]) if callable(value) else value).contiguous()
    save_file(held, path)


def edit(path, **fields):
    content = json.loads(path.read_text())
    content.get("adapter", content).update(fields)
    path.write_text(json.dumps(content))


def refused(folder, match, build=tiny_llama):
    """Loading it is an error of one line, and the model stays a plain one."""
    model = build()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    types = [type(module) for module in model.modules()]
    with pytest.raises(UserError, match=match) as caught:
        doratune.load(model, folder)
    assert "\n" not in str(caught.value)
    assert [type(module) for module in model.modules()] == types
    assert all(torch.equal(t, model.state_dict()[key]) for key, t in before.items())
    assert "_doratune" not in vars(model)
    doratune.attach(model, AdapterConfig(rank=2, targets=["q_proj"] if build is tiny_llama else "all-linear"))


DTYPES = {
    "A in int8": ("lora_A", lambda t: (t * 100).to(torch.int8), r"lora_A is int8, expected floating-point"),
    "B in int64": ("lora_B", lambda t: t.long(), r"lora_B is int64, expected floating-point"),
    "m as bool": ("magnitude", lambda t: t > 0, r"magnitude is bool, expected floating-point"),
    "m as uint8": ("magnitude", lambda t: t.to(torch.uint8), r"magnitude is uint8, expected floating-point"),
    "complex A": ("lora_A", lambda t: t.to(torch.complex64), r"lora_A is complex64, expected floating-point"),
    "a whole module in int32": ("norm.weight", lambda t: t.int(), r"model\.norm\.weight is int32, the model's is float32"),
}


@pytest.mark.parametrize("name", DTYPES)
def test_numbers_of_another_kind(name, folder):
    part, value, message = DTYPES[name]
    change(folder / TENSORS, **{part: value})
    refused(folder, message)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["lora_A", "lora_B", "magnitude", "norm.weight"])
def test_values_that_are_not_finite(part, value, folder):
    change(folder / TENSORS, **{part: lambda t: t.index_fill(-1, torch.tensor(1), value)})
    refused(folder, f"{part.replace('.', '[.]')} holds NaN or infinite values")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_any_floating_dtype_loads(dtype, folder):
    held = {key: t.to(dtype) for key, t in load_file(folder / TENSORS).items()}
    save_file(held, folder / TENSORS)
    narrow = logits(doratune.load(tiny_llama(), folder))
    save_file({key: t.float() for key, t in held.items()}, folder / TENSORS)
    torch.testing.assert_close(logits(doratune.load(tiny_llama(), folder)), narrow)


SECOND_KEYS = {
    "a line break": lambda key: key + "\n",
    "PEFT's name of an adapter": lambda key: key.replace(".weight", ".default.weight"),
    "no .weight": lambda key: key.removesuffix(".weight"),
    "without the prefix": lambda key: key.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("part", ["lora_A", "magnitude"])
@pytest.mark.parametrize("name", SECOND_KEYS)
def test_a_key_twice(name, part, folder):
    held = load_file(folder / TENSORS)
    key = next(key for key in sorted(held) if part in key)
    save_file(held | {SECOND_KEYS[name](key): held[key] + 1}, folder / TENSORS)
    refused(folder, "twice|fits nothing")


def test_a_file_of_pefts_type_with_another_axis(tmp_path):
    """q_proj of this model is square: the shapes fit either way."""
    doratune.save(randomize(doratune.attach(tiny_llama(), AdapterConfig(rank=4, targets=["q_proj"]))), tmp_path)
    edit(tmp_path / OWN, magnitude_axis="input")
    refused(tmp_path, r"says one magnitude per input, in a folder of PEFT's type it is per output; delete doratune\.json")


def test_an_embedding_of_pefts_type_with_another_axis(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(12, 12), nn.Linear(12, 12))

    config = AdapterConfig(rank=2, targets=["0"], embedding_magnitude="dimension")
    doratune.save(randomize(doratune.attach(build(), config)), tmp_path)
    edit(tmp_path / OWN, embedding_magnitude="token")
    refused(tmp_path, "says one magnitude per output, in a folder of PEFT's type it is per input", build)


@pytest.mark.parametrize("value", [0.0, -0.5])
def test_a_relative_magnitude_is_positive(value, tmp_path):
    relative_folder(tmp_path)
    change(tmp_path / TENSORS, magnitude=lambda t: t.index_fill(0, torch.tensor(3), value))
    refused(tmp_path, "magnitude holds values of 0 or less")


def test_a_relative_magnitude_of_a_row_of_zeros_is_zero(tmp_path):
    def build():
        model = tiny_llama()
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight[3] = 0
        return model

    config = AdapterConfig(rank=4, targets=["q_proj"], magnitude_form="relative", method="dloha")
    model = doratune.attach(build(), config)
    doratune.save(model, tmp_path)
    assert torch.equal(logits(doratune.load(build(), tmp_path)), logits(model))


STARTS_WRONG = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "no file of tensors": lambda path: path.write_bytes(b"nothing"),
    "NaN": lambda path: change(path, magnitude_start=lambda t: t * float("nan")),
    "negative": lambda path: change(path, magnitude_start=lambda t: -t),
    "another shape": lambda path: change(path, magnitude_start=lambda t: t[:-1]),
    "whole numbers": lambda path: change(path, magnitude_start=lambda t: t.long()),
    "a layer is missing": lambda path: save_file(dict(list(load_file(path).items())[1:]), path),
    "a layer too many": lambda path: save_file(load_file(path) | {"other.magnitude_start": torch.ones(3)}, path),
}


@pytest.mark.parametrize("name", STARTS_WRONG)
def test_a_corrupt_file_of_starts(name, tmp_path):
    relative_folder(tmp_path)
    STARTS_WRONG[name](tmp_path / STARTS)
    refused(tmp_path, STARTS)


ENDLESS = [r"(.*)*_nothing", r"(([a-z_.0-9])+)+!", r"(.*a){30}.*b!", r"(\w+\.?)+#"]


@pytest.mark.parametrize("pattern", ENDLESS)
@pytest.mark.parametrize("setting", ["target_modules", "exclude_modules"])
def test_a_pattern_without_an_end(setting, pattern, folder):
    edit(folder / CONFIG, **{setting: pattern})
    (folder / OWN).unlink()
    started = time.perf_counter()
    model = tiny_llama()
    with pytest.raises(UserError) if setting == "target_modules" else _whatever():
        doratune.load(model, folder)
    assert time.perf_counter() - started < 20


class _whatever:
    """An error of ours or none: some engines see at once that the pattern matches nothing, and then nothing is excluded."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        return kind is not None and issubclass(kind, UserError)


@pytest.mark.parametrize("where", ["targets", "exclude"])
def test_a_pattern_without_an_end_in_a_configuration(where):
    started = time.perf_counter()
    with pytest.raises(UserError, match=r"backtracks without end|matches no whole module name"):
        doratune.attach(tiny_llama(), AdapterConfig(rank=2, **{"targets": "all-linear", where: r"((([a-z_.0-9])+)+)+!"}))
    assert time.perf_counter() - started < 20


PATTERNS = {
    "a broken rank pattern": ({"rank_pattern": {"(q_proj": 2}}, "not a valid regular expression"),
    "a broken alpha pattern": ({"alpha_pattern": {"[q_proj": 2}}, "not a valid regular expression"),
    "a broken target": ({"target_modules": "*q_proj"}, "not a valid regular expression"),
    "a broken exclusion": ({"exclude_modules": "q_proj)"}, "not a valid regular expression"),
    "NaN": ({"rank_pattern": {"q_proj": float("nan")}}, "rank_pattern is .*expected positive whole numbers"),
    "an infinite alpha": ({"alpha_pattern": {"q_proj": float("inf")}}, "alpha_pattern is .*expected positive numbers"),
    "half a rank": ({"rank_pattern": {"q_proj": 2.5}}, "expected positive whole numbers"),
    "a target that is no name": ({"target_modules": ["q_proj", 3]}, "target_modules holds 3; expected names"),
    "a whole module that is no name": ({"modules_to_save": [None]}, "modules_to_save holds None; expected names"),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_that_are_none(name, folder):
    fields, message = PATTERNS[name]
    edit(folder / CONFIG, **fields)
    (folder / OWN).unlink()
    refused(folder, message)


@pytest.mark.parametrize("rows", [[2], [0, 5], list(range(13))])
@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("start", ["zero", "pissa", "olora"])
def test_a_start_with_rows_of_zeros_is_saved_as_numbers(start, axis, rows, tmp_path):
    """Before a step A − A₀ is 0: the tiny direction that PEFT needs on such rows is put on a factor that is not."""

    def build():
        torch.manual_seed(0)
        model = nn.Sequential()
        model.add_module("layer", nn.Linear(13, 13))
        with torch.no_grad():
            (model.layer.weight if axis == "output" else model.layer.weight.T)[rows] = 0
        return model

    config = {"rank": 3, "targets": ["layer"], "start": start}
    if axis == "input":

        def build_embedding():
            torch.manual_seed(0)
            model = nn.Sequential()
            model.add_module("layer", nn.Embedding(13, 13))
            with torch.no_grad():
                model.layer.weight[:, rows] = 0
            return model

        build, config = build_embedding, config | {"embedding_magnitude": "dimension"}
    model = doratune.attach(build(), AdapterConfig(**config))
    doratune.save(model, tmp_path, format="peft")
    held = load_file(tmp_path / TENSORS)
    assert all(torch.isfinite(t).all() for t in held.values())
    x = torch.arange(13) if axis == "input" else torch.randn(4, 13)
    torch.testing.assert_close(doratune.load(build(), tmp_path)(x), build()(x), rtol=1e-4, atol=1e-5)
    import peft

    theirs = peft.PeftModel.from_pretrained(build(), tmp_path)
    torch.testing.assert_close(theirs(x), build()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("protocol", ["likelihood", "generate"])
@pytest.mark.parametrize("what", ["adapter", "model", "logits"])
def test_a_model_without_numbers_is_not_scored(what, protocol, tiny_tokenizer):
    from doratune.evaluation.evaluate import evaluate

    model = doratune.attach(tiny_llama(), AdapterConfig(rank=2, targets=["q_proj"]))
    with torch.no_grad():
        if what == "adapter":
            model.model.layers[0].self_attn.q_proj.magnitude.fill_(float("nan"))
        elif what == "model":
            model.lm_head.weight[4, 5] = float("inf")
        else:
            model.lm_head.weight.mul_(1e38)
            model.model.norm.weight.mul_(1e30)
    items = [{"instruction": "Please answer true or false: 1?", "input": "", "output": "", "answer": "true"}] * 2
    with pytest.raises(UserError, match="NaN"):
        evaluate(model, tiny_tokenizer, [("boolq", items)], [protocol])


def test_the_message_names_the_one_layer(tmp_path):
    model, _ = one_layer()
    doratune.save(model, tmp_path)
    change(tmp_path / TENSORS, magnitude=lambda t: t * float("nan"))
    plain = one_layer()[0]
    doratune.detach(plain)
    with pytest.raises(UserError, match=r"layer\.magnitude holds NaN"):
        doratune.load(plain, tmp_path)
