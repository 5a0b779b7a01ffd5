"""`doratune convert`: round trips between an adapter folder and every format give the same outputs; what a format cannot say is
refused; the output is whole or absent."""

import json

import peft
import pytest
import torch
from conftest import randomize, tiny_llama
from definitions import (
    CLOSE,
    IMAGES,
    UNET_CONV,
    Convolutional,
    assert_merges_to,
    denoised,
    logits,
    tiny_unet,
    write,
    write_settings,
)
from safetensors import safe_open
from safetensors.torch import load_file

import doratune
from doratune import AdapterConfig
from doratune.checkpoint.convert import convert, targets
from doratune.cli.main import main
from doratune.errors import UserError

LLAMA = ["q_proj", "k_proj", "down_proj"]


def saved(folder, build=tiny_llama, **settings):
    """(outputs' model, folder) of an adapter away from its start."""
    model = doratune.attach(build(), AdapterConfig(**{"rank": 4, "targets": LLAMA} | settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, layer in doratune.adapters(model):
            for name in layer.adapted.direction.names:
                p = getattr(layer, name)
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    randomize(model)
    with torch.no_grad():
        for _, layer in doratune.adapters(model):
            for name in layer.adapted.direction.names[-2:]:
                p = getattr(layer, name)
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    doratune.save(model, folder)
    return model


def weights_of(model):
    """W' of each adapted module, in float64, as merging gives it."""
    names = [name for name, _ in doratune.adapters(model)]
    doratune.merge(model)
    merged = {name: model.get_submodule(name).weight.detach().double().clone() for name in names}
    doratune.unmerge(model)
    return merged


OF_LLAMA = ["kohya", "torchtune", "mlx", "authors", "diffusers", "ai-toolkit"]


@pytest.mark.parametrize("to", OF_LLAMA)
@pytest.mark.parametrize("ranks", [{}, {"k_proj": 2}], ids=["one rank", "ranks"])
def test_round_trips_of_a_llama(to, ranks, tmp_path):
    model = saved(tmp_path / "peft", rank_overrides=ranks, alpha_overrides={"down_proj": 5.0})
    weights = weights_of(model)
    stated = {"model": tiny_llama(), "component": "transformer" if to in ("diffusers", "ai-toolkit") else None}
    convert(tmp_path / "peft", to, tmp_path / to, **stated)
    alpha = {}
    assert_merges_to(doratune.load(tiny_llama(), tmp_path / to, **alpha), weights)
    done = convert(tmp_path / to, "peft", tmp_path / "back", **stated)
    assert done.source_format == to and done.target_format == "peft" and done.modules == len(weights)
    assert_merges_to(doratune.load(tiny_llama(), tmp_path / "back"), weights)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "back").eval()
    torch.testing.assert_close(logits(theirs), logits(model), **CLOSE)


@pytest.mark.parametrize("to", ["kohya", "mlx", "diffusers"])
def test_lora_without_a_magnitude(to, tmp_path):
    model = saved(tmp_path / "peft", method="lora")
    convert(tmp_path / "peft", to, tmp_path / to, component="unet" if to == "diffusers" else None, model=tiny_llama())
    assert_merges_to(doratune.load(tiny_llama(), tmp_path / to), weights_of(model))


UNET = {"targets": ["to_q", "to_k", "conv1", "conv2"], "rank_overrides": {"conv1": 3}}


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_round_trips_of_a_unet(to, tmp_path):
    model = saved(tmp_path / "peft", tiny_unet, **UNET)
    assert UNET_CONV in dict(doratune.adapters(model))
    weights = weights_of(model)
    convert(tmp_path / "peft", to, tmp_path / "style.safetensors", component="unet")
    loaded = doratune.load(tiny_unet(), tmp_path / "style.safetensors")
    torch.testing.assert_close(denoised(loaded), denoised(model), **CLOSE)
    assert_merges_to(loaded, weights)
    convert(tmp_path / "style.safetensors", "peft", tmp_path / "back", component="unet", model=tiny_unet())
    theirs = peft.PeftModel.from_pretrained(tiny_unet(), tmp_path / "back").eval()
    torch.testing.assert_close(denoised(theirs), denoised(model), **CLOSE)


@pytest.mark.parametrize("method", ["loha", "dloha", "lokr", "dlokr"])
@pytest.mark.parametrize("build", [tiny_llama, Convolutional])
def test_loha_and_lokr_through_kohya(method, build, tmp_path):
    targets = LLAMA if build is tiny_llama else ["first", "second", "head"]
    model = saved(tmp_path / "own", build, method=method, rank=2, targets=targets)
    weights = weights_of(model)
    convert(tmp_path / "own", "kohya", tmp_path / "x.safetensors", model=build(), component=None)
    assert_merges_to(doratune.load(build(), tmp_path / "x.safetensors"), weights)
    convert(tmp_path / "x.safetensors", "doratune", tmp_path / "back", model=build())
    assert_merges_to(doratune.load(build(), tmp_path / "back"), weights)


def test_the_input_axis_through_kohya(tmp_path):
    model = saved(tmp_path / "own", magnitude_axis="input")
    weights = weights_of(model)
    convert(tmp_path / "own", "kohya", tmp_path / "x.safetensors")
    shapes = {k.split(".")[-1]: t.shape for k, t in load_file(tmp_path / "x.safetensors").items()}
    assert shapes["dora_scale"][0] == 1 and shapes["dora_scale"][1] > 1
    assert_merges_to(doratune.load(tiny_llama(), tmp_path / "x.safetensors"), weights)
    for to in ("peft", "mlx", "torchtune", "authors", "diffusers", "ai-toolkit"):
        with pytest.raises(UserError, match="one magnitude per input column"):
            convert(tmp_path / "x.safetensors", to, tmp_path / "no", model=tiny_llama(), component="transformer")
        assert not (tmp_path / "no").exists()
    convert(tmp_path / "x.safetensors", "doratune", tmp_path / "back", model=tiny_llama())
    assert_merges_to(doratune.load(tiny_llama(), tmp_path / "back"), weights)


def test_magnitude_only_modules(tmp_path):
    """PEFT's rank 1 with B = 0 is exact in every format."""
    model = saved(tmp_path / "own", targets=["q_proj"], magnitude_only=["v_proj"])
    weights = weights_of(model)
    for to in ("kohya", "mlx", "authors"):
        convert(tmp_path / "own", to, tmp_path / to)
        assert_merges_to(doratune.load(tiny_llama(), tmp_path / to), weights)


CANNOT = {
    "vera": ({"method": "vera", "targets": ["q_proj", "v_proj"]}, "vera"),
    "dvora": ({"method": "dvora", "targets": ["q_proj"]}, "dvora"),
    "trained whole": ({"targets": ["q_proj"], "also_train": ["lm_head"]}, "lm_head"),
    "loha": ({"method": "dloha", "rank": 2}, "dloha"),
    "embedding": ({"targets": ["embed_tokens"], "embedding_magnitude": "dimension"}, "embed"),
}


@pytest.mark.parametrize("case", CANNOT)
@pytest.mark.parametrize("to", OF_LLAMA)
def test_what_a_format_cannot_say_is_refused_with_the_reason(case, to, tmp_path):
    if (case, to) == ("loha", "kohya"):
        pytest.skip("LyCORIS has it")
    settings, word = CANNOT[case]
    saved(tmp_path / "own", **settings)
    with pytest.raises(UserError, match=word) as error:
        convert(tmp_path / "own", to, tmp_path / "out", model=tiny_llama(), component="transformer")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_settings_of_training_are_named_when_they_are_left_behind(tmp_path, capsys):
    model = saved(tmp_path / "own", magnitude_form="relative", norm_gradient="full")
    done = convert(tmp_path / "own", "kohya", tmp_path / "x.safetensors")
    assert set(done.left_behind) == {"magnitude_form='relative'", "norm_gradient='full'"}
    assert_merges_to(doratune.load(tiny_llama(), tmp_path / "x.safetensors"), weights_of(model))


def test_an_offset_start_is_a_lora_of_twice_the_rank(tmp_path):
    model = saved(tmp_path / "own", start="pissa")
    convert(tmp_path / "own", "mlx", tmp_path / "mlx")
    assert_merges_to(doratune.load(tiny_llama(), tmp_path / "mlx"), weights_of(model))


def test_through_every_format_in_turn(tmp_path):
    model = saved(tmp_path / "0")
    weights, before = weights_of(model), tmp_path / "0"
    for number, to in enumerate(["kohya", "mlx", "authors", "torchtune", "diffusers", "ai-toolkit", "doratune", "peft"], 1):
        convert(before, to, tmp_path / str(number), model=tiny_llama(), component="transformer")
        before = tmp_path / str(number)
    assert_merges_to(doratune.load(tiny_llama(), before), weights)


def test_values_are_fp32_whatever_the_file_has(tmp_path):
    saved(tmp_path / "own")
    convert(tmp_path / "own", "kohya", tmp_path / "x.safetensors")
    half = {k: t.half() for k, t in load_file(tmp_path / "x.safetensors").items()}
    write(tmp_path / "half.safetensors", half)
    convert(tmp_path / "half.safetensors", "mlx", tmp_path / "mlx", model=tiny_llama())
    assert {t.dtype for t in load_file(tmp_path / "mlx" / "adapters.safetensors").values()} == {torch.float32}
    model = doratune.load(tiny_llama(), tmp_path / "half.safetensors")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_command(tmp_path, capsys):
    model = saved(tmp_path / "own")
    tiny_llama().save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    assert (
        main(
            ["convert", "--adapter", str(tmp_path / "own"), "--to", "torchtune", "--output", str(tmp_path / "tt"), "--model", base]
        )
        == 0
    )
    argv = [
        "convert",
        "--adapter",
        str(tmp_path / "tt"),
        "--to",
        "peft",
        "--output",
        str(tmp_path / "back"),
        "--model",
        base,
        "--json",
    ]
    assert main(argv) == 0
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert done["source_format"] == "torchtune" and done["modules"] == 6
    assert_merges_to(doratune.load(tiny_llama(), tmp_path / "back"), weights_of(model))
    assert main(argv) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main([*argv, "--overwrite"]) == 0
    assert main(["convert", "--adapter", str(tmp_path / "tt"), "--to", "pert", "--output", "x"]) == 2
    assert "did you mean 'peft'" in capsys.readouterr().err
    assert main(["convert", "--to", "peft", "--output", "x"]) == 2
    assert "adapter is not set" in capsys.readouterr().err


def test_a_pipeline_s_part_is_the_model(tmp_path, capsys):
    model = saved(tmp_path / "own", tiny_unet, **UNET)
    tiny_unet().save_pretrained(tmp_path / "pipe" / "unet")
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    convert(tmp_path / "own", "kohya", tmp_path / "style.safetensors", component="unet")
    argv = ["convert", "--adapter", str(tmp_path / "style.safetensors"), "--to", "peft", "--output", str(tmp_path / "back")]
    assert main(argv) == 2
    assert "underscores" in capsys.readouterr().err
    assert main([*argv, "--model", str(tmp_path / "pipe")]) == 2
    assert "is a pipeline; say which part with component: unet" in capsys.readouterr().err
    assert main([*argv, "--model", str(tmp_path / "pipe"), "--component", "unet"]) == 0
    torch.testing.assert_close(denoised(doratune.load(tiny_unet(), tmp_path / "back")), denoised(model), **CLOSE)


def test_merging_on_disk_takes_other_programs_files(tmp_path):
    from doratune.checkpoint.merge import merge_checkpoint

    model = saved(tmp_path / "own")
    tiny_llama().save_pretrained(tmp_path / "base")
    convert(tmp_path / "own", "kohya", tmp_path / "x.safetensors")
    merge_checkpoint(str(tmp_path / "base"), tmp_path / "x.safetensors", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, weight in weights_of(model).items():
        assert (merged[f"{name}.weight"].double() - weight).norm() <= 2e-6 * weight.norm()


def test_only_safetensors_is_written_with_its_metadata(tmp_path):
    saved(tmp_path / "own")
    for to in targets():
        convert(tmp_path / "own", to, tmp_path / to, model=tiny_llama(), component="unet")
        files = sorted(p.name for p in (tmp_path / to).iterdir())
        assert not any(name.endswith((".bin", ".pt")) for name in files)
        weights = next(p for p in (tmp_path / to).iterdir() if p.suffix == ".safetensors")
        with safe_open(weights, "pt") as file:
            assert file.metadata()["format"] == "pt"


def test_an_output_is_whole_or_absent(tmp_path, monkeypatch):
    saved(tmp_path / "own")
    convert(tmp_path / "own", "kohya", tmp_path / "x.safetensors")
    convert(tmp_path / "own", "mlx", tmp_path / "mlx")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def broken(*_, **__):
        raise OSError("no space left on device")

    for to, output in (("kohya", "x.safetensors"), ("kohya", "new"), ("mlx", "new"), ("mlx", "mlx"), ("peft", "new")):
        with monkeypatch.context() as patched:
            patched.setattr("doratune.support.files.save_file", broken)
            with pytest.raises((OSError, UserError), match="no space"):
                convert(tmp_path / "own", to, tmp_path / output, overwrite=True)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    convert(tmp_path / "own", "kohya", tmp_path / "x.safetensors", overwrite=True)


def test_outputs_that_are_in_the_way(tmp_path):
    saved(tmp_path / "own")
    tiny_llama().save_pretrained(tmp_path / "base")
    (tmp_path / "x.safetensors").write_bytes(b"precious")
    convert(tmp_path / "own", "mlx", tmp_path / "mlx")
    (tmp_path / "mlx" / "notes.txt").write_text("precious")
    cases = [
        ("kohya", "x.safetensors", False, "exists; give another name"),
        ("kohya", "x.safetensors", True, "x.safetensors, which no doratune command wrote"),
        ("mlx", "mlx", True, "notes.txt, which no doratune command wrote"),
        ("mlx", "y.safetensors", False, "mlx is a folder"),
        ("peft", "own", True, "is the adapter"),
        ("peft", "own/inner", True, "lies in the adapter"),
        ("kohya", "own/adapter_model.safetensors", True, "lies in the adapter"),
        ("peft", "base", True, "is the model"),
        ("peft", "x.safetensors/inner", False, "is a file"),
    ]
    for to, output, overwrite, message in cases:
        with pytest.raises(UserError, match=message):
            convert(tmp_path / "own", to, tmp_path / output, model=str(tmp_path / "base"), overwrite=overwrite)
    assert (tmp_path / "x.safetensors").read_bytes() == b"precious"
    assert logits(doratune.load(tiny_llama(), tmp_path / "own")).isfinite().all()


def test_convolutions_keep_their_filters(tmp_path):
    model = saved(tmp_path / "own", Convolutional, targets=["first", "second", "head"], rank=3)
    convert(tmp_path / "own", "kohya", tmp_path / "x.safetensors", component="unet")
    tensors = load_file(tmp_path / "x.safetensors")
    assert tensors["lora_unet_first.lora_down.weight"].shape == (3, 4, 3, 3)
    assert tensors["lora_unet_first.dora_scale"].shape == (8, 1, 1, 1) and tensors["lora_unet_head.dora_scale"].shape == (5, 1)
    with torch.no_grad():
        torch.testing.assert_close(doratune.load(Convolutional(), tmp_path / "x.safetensors")(IMAGES), model(IMAGES), **CLOSE)


class OtherConvolutions(torch.nn.Module):
    """One dimension, three dimensions, two groups, a kernel that is dilated."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.line = torch.nn.Conv1d(4, 8, 3, padding=1)
        self.space = torch.nn.Conv3d(1, 3, (1, 2, 2))
        self.grouped = torch.nn.Conv2d(8, 6, 3, groups=2)
        self.dilated = torch.nn.Conv2d(6, 4, 2, dilation=2)


@pytest.mark.parametrize("method", ["lora", "dora", "dloha", "dlokr"])
def test_other_convolutions_through_kohya(method, tmp_path):
    model = saved(tmp_path / "own", OtherConvolutions, method=method, rank=1, targets="all-layers")
    weights = weights_of(model)
    assert len(weights) == 4
    convert(tmp_path / "own", "kohya", tmp_path / "x.safetensors", model=OtherConvolutions())
    assert_merges_to(doratune.load(OtherConvolutions(), tmp_path / "x.safetensors"), weights)
    if method == "dora":
        with pytest.raises(UserError, match="grouped is a convolution in 2 groups"):
            convert(tmp_path / "x.safetensors", "peft", tmp_path / "peft", model=OtherConvolutions())
    convert(tmp_path / "x.safetensors", "doratune", tmp_path / "back", model=OtherConvolutions())
    assert_merges_to(doratune.load(OtherConvolutions(), tmp_path / "back"), weights)


@pytest.mark.parametrize(("method", "to"), [("vera", "peft"), ("vera", "doratune"), ("dvora", "doratune"), ("dloha", "doratune")])
def test_other_directions_between_folders(method, to, tmp_path):
    model = saved(tmp_path / "own", method=method, rank=2, targets=["q_proj", "k_proj"], seed=5)
    convert(tmp_path / "own", to, tmp_path / "out")
    assert_merges_to(doratune.load(tiny_llama(), tmp_path / "out"), weights_of(model))


def test_vera_whose_factors_are_not_in_the_file(tmp_path):
    """PEFT may leave them to the seed, which other folders do not have."""
    with pytest.warns(UserWarning, match="not save vera_A"):
        model = peft.get_peft_model(tiny_llama(), peft.VeraConfig(r=2, target_modules=["v_proj"], save_projection=False))
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match="lacks the factors that its layers share"):
        convert(tmp_path / "theirs", "doratune", tmp_path / "out")


def test_experts_are_refused(tmp_path):
    """A folder of ours with four experts: A (E, R, I), B (E, O, R), m (E, O)."""
    key, ones = "base_model.model.model.layers.0.mlp.experts.down_proj", torch.ones
    tensors = {
        f"{key}.lora_A.weight": ones(4, 2, 8),
        f"{key}.lora_B.weight": ones(4, 16, 2),
        f"{key}.lora_magnitude_vector": ones(4, 16),
    }
    write(tmp_path / "own" / "adapter_model.safetensors", tensors)
    said = {
        "peft_type": "DORATUNE",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": [key.removeprefix("base_model.model.")],
        "use_dora": True,
    }
    write_settings(tmp_path / "own", said | {"method": "dora"})
    for to in targets():
        with pytest.raises(UserError, match="batched experts"):
            convert(tmp_path / "own", to, tmp_path / "out", model=tiny_llama(), component="unet")
