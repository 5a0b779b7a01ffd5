"""Plans of text-to-image pipelines against real steps of the same pipelines; the published ones from their configs alone."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from pipelines import SIDE, pipeline_folder
from real_steps import peak_bytes

from doratune import UserError
from doratune.cli.main import main
from doratune.planning import Planner, PlanSettings
from doratune.planning.advice import changes
from doratune.planning.architecture import architecture_of, stored_bytes
from doratune.planning.log import ADAPTERS, IMAGES, WEIGHTS, AllocationLog
from doratune.planning.step import step_bytes
from doratune.planning.workloads import refuse_others
from doratune.support.pipelines import load_pipeline, networks
from doratune.training.denoising import StepNoise
from doratune.training.methods import method_of

pytest.importorskip("diffusers")
BATCH = 3
PROMPT = "a photo of sks dog"
RESOLUTION = 4 * SIDE
CASES = [
    ("sd", {}),
    ("sdxl", {"dtype": "bfloat16", "checkpointing": "non-reentrant", "snr_gamma": 5.0}),
    ("sd", {"class_images": "dogs", "class_prompt": "a photo of a dog", "method": "lora"}),
    ("sdxl", {"text_encoders": "adapted"}),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("pipelines")
    return {kind: str(pipeline_folder(place / kind, kind)) for kind in ("sd", "sdxl")}


def settings_of(folder, **more):
    usual = {"objective": "dreambooth", "instance_prompt": PROMPT, "instance_token": "sks", "resolution": RESOLUTION, "rank": 2}
    usual |= {"targets": ["to_q", "to_k", "to_v", "to_out.0"], "dtype": "float32", "batch_size": BATCH, "device": "cpu"}
    return PlanSettings(**usual | {"model": folder, "process": 0.0, "largest": "none", "data": "x"} | more)


def real_peak(settings) -> int:
    """Most bytes alive in a real step, the second, of the same recipe."""
    objective = architecture_of(settings).workload.of_training
    objective.pipeline, objective.noise = load_pipeline(settings.model, settings.dtype), StepNoise(0)
    objective.prompts = [PROMPT]
    row = {"mean": torch.zeros(4, SIDE, SIDE), "deviation": torch.ones(4, SIDE, SIDE), "sizes": torch.ones(6), "prompt": PROMPT}
    objective.pairs = [(row, None)]
    model = objective.load(settings.dtype)
    method_of(settings, objective).prepare(model)
    count, side = BATCH * (2 if settings.class_images else 1), RESOLUTION // 2
    latents = {name: torch.randn(count, 4, side, side) for name in ("mean", "deviation")}
    prompts = [PROMPT] * BATCH + [settings.class_prompt] * (count - BATCH)
    inputs = latents | {"prompts": prompts, "instances": BATCH, "sizes": torch.full((count, 6), float(RESOLUTION))}
    inside = {id(t) for t in (*model.parameters(), *model.buffers())}
    others = [t for m in networks(objective.pipeline).values() for t in (*m.parameters(), *m.buffers()) if id(t) not in inside]
    before = {IMAGES: list(latents.values()), ADAPTERS: others}
    return peak_bytes(model, settings, lambda forward: forward(**inputs)["loss"], -1, before)


@pytest.mark.parametrize(("kind", "more"), CASES, ids=[f"{kind} {' '.join(map(str, more))}" for kind, more in CASES])
def test_a_plan_is_what_a_step_allocates(kind, more, folders):
    wanted = settings_of(folders[kind], **more)
    step = step_bytes(architecture_of(wanted), BATCH, 1)
    planned = max(step.phases[phase] for phase in ("step", "forward", "backward"))
    assert planned == pytest.approx(real_peak(wanted), rel=0.05)


@pytest.mark.parametrize(("more", "work"), [({}, "encoding"), ({"sample_prompts": [PROMPT]}, "decoding")])
def test_the_vae_works_between_steps(more, work, folders):
    wanted = settings_of(folders["sd"], **more)
    step = step_bytes(architecture_of(wanted), BATCH, 1)
    vae = load_pipeline(folders["sd"]).vae
    log = AllocationLog(1, 2**62)
    given = torch.randn(1, 4, RESOLUTION // 2, RESOLUTION // 2) if work == "decoding" else torch.randn(1, 3, RESOLUTION, RESOLUTION)
    with torch.no_grad(), log:
        getattr(vae, work.removesuffix("ing") + "e")(given)
    resident = sum(step.terms[term] for term in (WEIGHTS, "adapters", "optimizer", "factors", IMAGES))
    assert set(step.phases) == {"step", "forward", "backward", work}
    assert step.phases[work] - resident == pytest.approx(log.peak(0, log.operations)[0], rel=0.1)


def test_all_that_lies_on_the_device_is_counted(folders):
    wanted = settings_of(folders["sdxl"])
    whole = sum(p.nbytes for m in networks(load_pipeline(wanted.model)).values() for p in (*m.parameters(), *m.buffers()))
    weights, adapters, trained = stored_bytes(architecture_of(wanted))
    assert weights == whole and adapters == 4 * trained
    assert Planner(wanted).plan().terms[WEIGHTS] == whole


def test_configs_alone_will_do_and_lines_say_what_is_read(folders, tmp_path, capsys):
    """No weights, no tokenizer; a recipe, its time; no change is a base in 4 bits."""
    bare = tmp_path / "bare"
    shutil.copytree(folders["sd"], bare, ignore=lambda _, names: [n for n in names if n.endswith((".safetensors", ".txt"))])
    words = f"plan --objective dreambooth --model {bare} --instance_prompt '' --resolution {RESOLUTION} --rank 2 --device cpu"
    flags = ["--class_images", "dogs", "--class_prompt", "a dog", "--instance_prompt", PROMPT, "--max_steps", "30", "--tflops", "1"]
    assert main([*words.replace("''", "x").split(), *flags, "--targets", "to_q", "--batch_size", "4"]) == 0
    out = capsys.readouterr().out
    assert f"4 images of {RESOLUTION} x {RESOLUTION} and as many of its class" in out and "time at 1 x 10^12" in out
    wanted = settings_of(str(bare))
    tried = dict(changes(wanted, architecture_of(wanted).workload))
    assert {settings.quantize for settings in tried.values()} == {"none"} and len(tried) == 2  # as it is; checkpointing


def test_operations_are_those_of_a_step(folders):
    """Whatever the VAE does between steps."""
    plans = [Planner(settings_of(folders["sd"], sample_prompts=prompts)).plan() for prompts in ([], [PROMPT])]
    assert plans[0].flops == plans[1].flops > 0


def test_what_is_no_such_pipeline_is_a_line(folders, tmp_path):
    with pytest.raises(UserError, match="holds no model, no pipeline of diffusers"):
        Planner(settings_of(str(tmp_path)))
    odd = tmp_path / "odd"
    shutil.copytree(folders["sd"], odd)
    config = json.loads((odd / "unet" / "config.json").read_text())
    (odd / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": 9}))
    with pytest.raises(UserError, match="takes 9 channels"):
        Planner(settings_of(str(odd)))
    with pytest.raises(UserError, match=r"resolution is 33, which the VAE of .* cannot divide by 2; give 32 or 34"):
        Planner(settings_of(folders["sd"], resolution=33))
    (odd / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match=r"odd/vae: .*config\.json"):
        Planner(settings_of(str(odd)))


def test_an_objective_without_a_workload_is_a_line():
    with pytest.raises(UserError, match=r"objective is poetry, and doratune plan counts .* dreambooth, "):
        refuse_others(SimpleNamespace(objective="poetry"))
