"""Files of no format, of several, incomplete, too full, damaged, or that would run code: one line each, nothing touched."""

import pickle

import pytest
import torch
from conftest import tiny_llama
from definitions import Convolutional, logits, numbers, write, write_settings

import doratune
from doratune.checkpoint.convert import convert
from doratune.errors import UserError

Q = "model.layers.0.self_attn.q_proj"
FLAT = "lycoris_" + Q.replace(".", "_")
A, B, M = numbers(1)(2, 32), numbers(2)(32, 2), 1 + numbers(3)(32).abs()

GOOD = {
    "kohya": {f"{FLAT}.lora_down.weight": A, f"{FLAT}.lora_up.weight": B, f"{FLAT}.dora_scale": M[:, None]},
    "loha": {f"{FLAT}.hada_w1_a": B, f"{FLAT}.hada_w1_b": A, f"{FLAT}.hada_w2_a": B, f"{FLAT}.hada_w2_b": A},
    "lokr": {f"{FLAT}.lokr_w1": A[:, :2], f"{FLAT}.lokr_w2": torch.ones(16, 16)},
    "ai-toolkit": {f"transformer.{Q}.lora_A.weight": A, f"transformer.{Q}.lora_B.weight": B, f"transformer.{Q}.magnitude": M},
    "torchtune": {f"layers.0.attn.q_proj.{k}": t for k, t in (("lora_a.weight", A), ("lora_b.weight", B), ("magnitude", M))},
    "mlx": {f"{Q}.lora_a": A.T, f"{Q}.lora_b": B.T, f"{Q}.m": M},
    "authors": {
        f"base_model.model.{Q}.{k}": t for k, t in (("lora_A.weight", A), ("lora_B.weight", B), ("weight_m_wdecomp.weight", M))
    },
    "diffusers": {f"unet.{Q}.{k}": t for k, t in (("lora_A.weight", A), ("lora_B.weight", B), ("lora_magnitude_vector", M))},
}
ALPHA = {"alpha": 4}


def refused(path, match, model=None, **stated):
    """Loading raises one line that matches, and the model is what it was."""
    model = tiny_llama() if model is None else model
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(UserError, match=match) as error:
        doratune.load(model, path, **stated)
    assert "\n" not in str(error.value)
    assert not list(doratune.adapters(model)) and all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


@pytest.mark.parametrize("name", GOOD)
def test_the_good_ones_load(name, tmp_path):
    doratune.load(tiny_llama(), write(tmp_path / "x.safetensors", GOOD[name]), **ALPHA)


@pytest.mark.parametrize("name", GOOD)
def test_one_tensor_less(name, tmp_path):
    """Each factor is needed; the message says which one is missing, and what the file holds."""
    for key in GOOD[name]:
        if key.endswith(("dora_scale", "magnitude", ".m", "wdecomp.weight", "_vector")):
            continue
        rest = {k: t for k, t in GOOD[name].items() if k != key}
        part = key.removeprefix(FLAT).split(Q)[-1].removeprefix("layers.0.attn.q_proj").lstrip(".")
        refused(write(tmp_path / "x.safetensors", rest), f"{part}|no format|which the model", **ALPHA)


@pytest.mark.parametrize("name", GOOD)
def test_tensors_that_the_format_has_not_are_all_listed(name, tmp_path):
    extra = {f"{Q}.strange_{i}": M for i in range(5)} | {"position_ids": M}
    path = write(tmp_path / "x.safetensors", GOOD[name] | extra)
    refused(path, r"strange_0.*strange_1.*strange_2.*strange_3.*strange_4.*it holds \d+ tensors", **ALPHA)
    refused(path, "position_ids", **ALPHA)


PAIRS = [
    ("kohya", "mlx"),
    ("kohya", "ai-toolkit"),
    ("mlx", "torchtune"),
    ("kohya", "diffusers"),
    ("authors", "kohya"),
    ("loha", "mlx"),
]


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_mixed_formats(pair, tmp_path):
    path = write(tmp_path / "x.safetensors", GOOD[pair[0]] | GOOD[pair[1]])
    refused(path, "mixes|tensors that this format has not", **ALPHA)


@pytest.mark.parametrize(
    "keys",
    [["a.weight"], ["lora_unet_x.oft_blocks"], ["lora_unet_x.diff"], ["x.lora_magnitude_vector"], ["model.embed.weight", "y"]],
)
def test_unknown_formats(keys, tmp_path):
    path = write(tmp_path / "x.safetensors", {key: M for key in keys})
    end = keys[0].removesuffix(".weight").split(".")[-1]
    refused(path, rf"no format that is known \(.*kohya.*\); it holds {len(keys)} tensors: .*{end}")
    with pytest.raises(UserError, match="no format that is known"):
        convert(path, "peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", GOOD)
def test_shapes_that_do_not_fit_each_other(name, tmp_path):
    tensors = dict(GOOD[name])
    key = next(
        k for k in tensors if k.endswith(("lora_up.weight", "hada_w1_a", "lora_B.weight", "lora_b.weight", "lora_b", "lokr_w1"))
    )
    tensors[key] = torch.ones(7, 5)
    refused(write(tmp_path / "x.safetensors", tensors), "ranks differ|do not fit|the model needs", **ALPHA)


@pytest.mark.parametrize("name", ["kohya", "ai-toolkit", "torchtune", "mlx", "authors", "diffusers"])
def test_magnitudes_of_another_length(name, tmp_path):
    tensors = dict(GOOD[name])
    key = next(k for k in tensors if tensors[k].dim() == 1 or k.endswith("dora_scale"))
    tensors[key] = torch.ones(31, 1) if key.endswith("dora_scale") else torch.ones(31)
    refused(write(tmp_path / "x.safetensors", tensors), r"\(31,", **ALPHA)


@pytest.mark.parametrize("name", GOOD)
def test_modules_that_the_model_has_not(name, tmp_path):
    other = {k.replace("q_proj", "wrong_proj"): t for k, t in GOOD[name].items()}
    refused(write(tmp_path / "x.safetensors", other), "wrong_proj", **ALPHA)
    refused(write(tmp_path / "y.safetensors", GOOD[name]), "model", Convolutional(), **ALPHA)


def test_some_modules_have_no_magnitude(tmp_path):
    other = "lycoris_model_layers_1_self_attn_q_proj"
    tensors = GOOD["kohya"] | {f"{other}.lora_down.weight": A, f"{other}.lora_up.weight": B}
    refused(write(tmp_path / "x.safetensors", tensors), "1 of 2 modules have no magnitude .*layers.1.self_attn.q_proj")


def test_names_that_underscores_leave_open(tmp_path):
    model = torch.nn.ModuleDict({"a_b": torch.nn.Linear(32, 32), "a": torch.nn.ModuleDict({"b": torch.nn.Linear(32, 32)})})
    tensors = {k.replace(FLAT, "lora_unet_a_b"): t for k, t in GOOD["kohya"].items()}
    refused(write(tmp_path / "x.safetensors", tensors), "lora_unet_a_b can mean", model)
    doratune.attach(model, doratune.AdapterConfig(rank=2, targets=["a_b", "a.b"]))
    doratune.save(model, tmp_path / "own")
    with pytest.raises(UserError, match="same name with underscores"):
        convert(tmp_path / "own", "kohya", tmp_path / "out.safetensors", component="unet")


def test_several_components_without_a_model(tmp_path):
    one = GOOD["diffusers"]
    path = write(tmp_path / "x.safetensors", one | {k.replace("unet.", "text_encoder."): t for k, t in one.items()})
    with pytest.raises(UserError, match=r"several components \(text_encoder, unet\)"):
        convert(path, "peft", tmp_path / "out")
    convert(path, "peft", tmp_path / "out", component="unet")
    with pytest.raises(UserError, match="no component 'vae'"):
        convert(path, "peft", tmp_path / "out", component="vae", overwrite=True)


class Payload:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["adapter_0.pt", "x.bin", "x.pth", "x.ckpt", "pytorch_lora_weights.bin"])
def test_a_pickle_that_would_run_code(name, tmp_path):
    trap = tmp_path / "trap"
    (tmp_path / name).write_bytes(pickle.dumps({"layers.0.attn.q_proj.lora_a.weight": Payload(str(trap))}))
    refused(tmp_path / name, "is not loaded, since that could run code")
    torch.save({"layers.0.attn.q_proj.lora_a.weight": Payload(str(trap))}, tmp_path / name)
    refused(tmp_path / name, "is not loaded, since that could run code")
    assert not trap.exists()


def test_the_authors_pickle_with_code(tmp_path):
    write_settings(tmp_path, {"peft_type": "DORA", "r": 2, "lora_alpha": 4})
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Payload(str(tmp_path / "trap"))))
    refused(tmp_path, "could run code")
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"PK\x03\x04 half a zip", b"{}", b"\xff" * 100])
@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "adapters.safetensors"])
def test_damaged_files(content, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, "corrupt|damaged|holds no tensors")


def test_what_is_no_adapter_at_all(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    refused(tmp_path / "x.json", "not a folder")
    refused(tmp_path / "nowhere.safetensors", "not a folder")
    refused(tmp_path, "adapter_config.json is missing")
    torch.save({"a": 3}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "no tensors: 'a'")
    torch.save([M], tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "holds no tensors by name")


def test_a_file_of_a_peft_folder_is_its_folder(tmp_path):
    model = doratune.attach(tiny_llama(), doratune.AdapterConfig(rank=2, targets=["q_proj"]))
    doratune.save(model, tmp_path / "own")
    refused(tmp_path / "own" / "adapter_model.safetensors", "give the folder .*own")


def test_alpha_and_axis_that_are_no_such_thing(tmp_path):
    path = write(tmp_path / "x.safetensors", GOOD["kohya"])
    refused(path, "magnitude_axis is 'rows'; expected output or input", magnitude_axis="rows")
    for alpha in (0, -1, float("nan"), "4"):
        refused(path, "alpha is .*expected a positive number", alpha=alpha)
        with pytest.raises(UserError, match="alpha is"):
            convert(path, "peft", tmp_path / "out", alpha=alpha, model=tiny_llama())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -2.0])
def test_an_alpha_in_the_file_that_is_no_number(value, tmp_path):
    refused(write(tmp_path / "x.safetensors", GOOD["kohya"] | {f"{FLAT}.alpha": torch.tensor(value)}), "alpha")


def test_a_model_that_has_an_adapter_already(tmp_path):
    path = write(tmp_path / "x.safetensors", GOOD["kohya"])
    model = doratune.load(tiny_llama(), path)
    expected = logits(model)
    with pytest.raises(UserError, match=r"has an adapter already|attached already"):
        doratune.load(model, path)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", ["kohya", "mlx"])
def test_the_base_model_has_to_be_said(name, tmp_path):
    from doratune.checkpoint.adapter import base_model_of

    with pytest.raises(UserError, match="records no base model; give --model"):
        base_model_of(write(tmp_path / "x.safetensors", GOOD[name]))
    write(tmp_path / "mlx" / "adapters.safetensors", GOOD["mlx"])
    write_settings(tmp_path / "mlx", {"lora_parameters": {"scale": 2.0}})
    with pytest.raises(UserError, match="records no base model; give --model"):
        base_model_of(tmp_path / "mlx")
    write_settings(tmp_path / "mlx", {"base_model_name_or_path": "some/model"})
    assert base_model_of(tmp_path / "mlx") == "some/model"


def test_two_names_of_one_module(tmp_path):
    tensors = GOOD["diffusers"] | {k.replace("unet.", "diffusion_model."): t for k, t in GOOD["diffusers"].items()}
    tensors = {k.replace("unet.", "model.diffusion_model."): t for k, t in tensors.items()}
    path = write(tmp_path / "x.safetensors", tensors)
    refused(path, "are the same module, model.layers.0")
    with pytest.raises(UserError, match="are the same module"):
        convert(path, "peft", tmp_path / "out")


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (1, 1, 1, 1, 1), (0, 4), (32, 32)])
@pytest.mark.parametrize("name", GOOD)
def test_factors_of_any_shape_are_a_line_or_fit(name, shape, tmp_path):
    for key in GOOD[name]:
        path = write(tmp_path / "x.safetensors", GOOD[name] | {key: torch.ones(shape)})
        message = ""
        try:
            doratune.load(tiny_llama(), path, **ALPHA)
        except UserError as error:
            message = str(error)
        assert "\n" not in message


@pytest.mark.parametrize("alpha", [torch.ones(2), torch.ones(2, 2), torch.ones(0)])
@pytest.mark.parametrize("name", ["kohya", "ai-toolkit", "diffusers"])
def test_an_alpha_of_several_numbers(name, alpha, tmp_path):
    key = next(iter(GOOD[name])).removesuffix(".lora_down.weight").removesuffix(".lora_A.weight") + ".alpha"
    refused(write(tmp_path / "x.safetensors", GOOD[name] | {key: alpha}), "alpha has shape .*expected one number")


@pytest.mark.parametrize("name", GOOD)
def test_tensors_of_whole_numbers(name, tmp_path):
    key = next(iter(GOOD[name]))
    path = write(tmp_path / "x.safetensors", GOOD[name] | {key: torch.ones(GOOD[name][key].shape, dtype=torch.int8)})
    refused(path, "no floating-point numbers: .*save them unquantized")


@pytest.mark.parametrize("said", [{"alpha_pattern": [1]}, {"alpha_pattern": {"(": 2}}, {"lora_alpha": None}, {"lora_alpha": True}])
def test_settings_of_diffusers_of_another_type(said, tmp_path):
    import json

    metadata = {f"unet.{k}": v for k, v in ({"r": 2, "lora_alpha": 4} | said).items()}
    refused(write(tmp_path / "x.safetensors", GOOD["diffusers"], {"lora_adapter_metadata": json.dumps(metadata)}), "alpha")
