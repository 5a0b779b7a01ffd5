"""Plans of tiny models against real steps of the same models, and what a plan says of what does not fit or cannot be counted."""

import contextlib
import json

import pytest
import torch
from conftest import tiny_llama
from real_steps import peak_bytes

from doratune import AdapterConfig, UserError, attach
from doratune.cli.main import main
from doratune.planning import Planner, PlanSettings
from doratune.planning.advice import largest
from doratune.planning.architecture import architecture_of
from doratune.planning.heap import heap_bytes
from doratune.planning.log import ADAPTERS, WEIGHTS, Allocation
from doratune.planning.step import step_bytes
from doratune.planning.workloads.language_modeling import text_inputs
from doratune.training.recipe import TrainRecipe

BATCH, LENGTH = 4, 48
LINEAR = "q_proj|v_proj|down_proj"


@pytest.fixture
def folder(tmp_path):
    """A model folder with a config alone."""
    tiny_llama().config.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def recipe(folder, **settings):
    values = {"model": folder, "data": "x", "rank": 4, "dtype": "float32", "targets": ["q_proj", "v_proj", "down_proj"]}
    made = TrainRecipe(**{**values, **settings})
    made.check()
    return made


def measured(settings: TrainRecipe) -> int:
    """Most bytes alive in a real step, the second, of the same recipe."""
    model = tiny_llama(dtype=torch.float32 if settings.method == "full" else getattr(torch, settings.dtype))
    if settings.method == "full":
        model.requires_grad_(True)
    else:
        attach(model, settings.adapter())
    inputs = text_inputs(model, BATCH, LENGTH, None)
    inputs["attention_mask"][0, 0] = 0  # so that there is a mask, as in batches of examples that are not all of one length
    return peak_bytes(model, settings, lambda forward: forward(**inputs)["loss"], 300)


SETTINGS = {
    "lora": {"method": "lora"},
    "dora": {"method": "dora"},
    "dora over bf16": {"method": "dora", "dtype": "bfloat16"},
    "dora on the input axis": {"method": "dora", "magnitude_axis": "input"},
    "the norm's gradient": {"method": "dora", "norm_gradient": "full"},
    "dvora": {"method": "dvora"},
    "dvora of a large rank": {"method": "dvora", "rank": 256},
    "dropout": {"method": "dora", "dropout": 0.1},
    "magnitude only": {"targets": [], "magnitude_only": ["q_proj", "up_proj"]},
    "all linear layers": {"targets": "all-linear"},
    "a module trained whole": {"method": "dora", "also_train": ["lm_head"], "dtype": "bfloat16"},
    "full": {"method": "full"},
    "full, autocast": {"method": "full", "dtype": "bfloat16"},
    "checkpointing": {"method": "dora", "checkpointing": "non-reentrant"},
    "reentrant checkpointing": {"method": "lora", "checkpointing": "reentrant"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_traced_step_takes_what_a_real_one_does(folder, settings):
    """Counted the same way, storage by storage: within 5 % for models so small that a few vectors count."""
    wanted = recipe(folder, **settings)
    step = step_bytes(architecture_of(wanted), BATCH, LENGTH)
    assert step.peak == pytest.approx(measured(wanted), rel=0.05)


def test_the_trained_numbers_are_those_of_attach(folder):
    model = attach(tiny_llama(), AdapterConfig(rank=4))
    step = step_bytes(architecture_of(recipe(folder, targets="all-linear")), 1, 8)
    assert step.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert step.terms[ADAPTERS] == 4 * step.trained


def test_accumulation_keeps_the_gradients(folder):
    one, several = (
        step_bytes(architecture_of(recipe(folder, method="full", gradient_accumulation=n)), BATCH, LENGTH) for n in (1, 4)
    )
    assert several.phases["forward"] == one.phases["forward"] + one.gradient_bytes


@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8"])
def test_a_quantized_base_is_smaller(folder, quantize):
    dense, stored = (step_bytes(architecture_of(recipe(folder, quantize=q)), BATCH, LENGTH) for q in ("none", quantize))
    numbers = sum(p.numel() for name, p in tiny_llama().named_parameters() if "_proj" in name)
    share = 1 if quantize == "int8" else 0.5
    assert dense.terms[WEIGHTS] - stored.terms[WEIGHTS] == pytest.approx((4 - share) * numbers, rel=0.05)


def test_a_heap_loses_what_lies_between():
    """1,000 bytes that were freed in front of a block that stays are of no use to the next 2,000."""
    log = [Allocation("a", 1000, 0, 2), Allocation("b", 64, 1, 4), Allocation("a", 2000, 3, 4)]
    assert heap_bytes(log, 1) >= 3000 + 64
    tight = [Allocation("a", 1000, 0, 1), Allocation("a", 1000, 2, 3), Allocation("a", 900, 4, 5)]
    assert heap_bytes(tight, 3) <= 1100


@pytest.mark.parametrize("near", [1, 3, 16, 1000])
@pytest.mark.parametrize("capacity", [5, 100, 1234, 99_999])
def test_the_largest_is_the_last_that_fits(near, capacity):
    def total(n):
        return max(10 + 7 * n, 13 * n)

    expected = max([n for n in range(10_000) if n and total(n) <= capacity], default=0)
    assert largest(total, capacity, near, 1_000_000) == expected


def planned(folder, **settings):
    values = {"model": folder, "rank": 4, "dtype": "float32", "batch_size": 4, "max_length": 64, "device": "cpu", "process": 0.0}
    return Planner(PlanSettings(**{**values, "largest": "none", **settings})).plan()


def test_the_largest_batch_fits_and_one_more_does_not(folder):
    plan = planned(folder, memory=0.02, largest="batch_size")
    assert plan.fits and plan.largest > 4
    assert planned(folder, memory=0.02, batch_size=plan.largest).fits is True
    assert planned(folder, memory=0.02, batch_size=plan.largest + 1).fits is False


def test_the_change_that_is_advised_fits(folder):
    plan = planned(folder, memory=0.004, batch_size=64)
    assert plan.fits is False and "--batch_size" in plan.change
    words = plan.change.partition(":")[0].removeprefix("--").split(" --")
    change = {name: value if name == "checkpointing" else int(value) for name, value in (word.split() for word in words)}
    assert change["batch_size"] * change["gradient_accumulation"] == 64
    assert planned(folder, memory=0.004, **change).fits is True


def test_nothing_fits_in_nothing(folder):
    plan = planned(folder, memory=1e-6, largest="batch_size")
    assert plan.fits is False and plan.change is None and plan.largest == 0


def test_devices_share_the_work(folder):
    one, ddp, fsdp, offload = (
        planned(folder, processes=n, fsdp=f, batch_size=4 * n) for n, f in ((1, "none"), (2, "none"), (2, "shard"), (2, "offload"))
    )
    assert ddp.total - one.total == 4 * one.trained
    assert fsdp.terms[WEIGHTS] == one.terms[WEIGHTS] // 2 and fsdp.terms["gathered"]
    assert WEIGHTS not in offload.terms
    assert planned(folder, processes=2, memory=0.02, largest="batch_size").largest % 2 == 0


def test_time_from_a_throughput(folder):
    assert planned(folder, tokens_per_second=100.0, tokens=36_000, epochs=2.0).seconds == 720
    assert planned(folder, tokens_per_second=100.0, max_steps=10).seconds == 10 * 4 * 64 / 100
    assert planned(folder, tokens_per_second=100.0).seconds is None


@pytest.mark.parametrize("how", ["flags", "recipe"])
def test_the_command(folder, tmp_path, capsys, how):
    flags = ["--rank", "4", "--batch_size", "2", "--max_length", "32", "--device", "cpu", "--memory", "2", "--json"]
    if how == "recipe":
        (tmp_path / "r.yaml").write_text("rank: 4\nbatch_size: 2\nmax_length: 32\ndata: nowhere.json\n")
        flags = ["--device", "cpu", "--memory", "2", "--json"]
    arguments = [str(tmp_path / "r.yaml")] * (how == "recipe") + ["--model", folder, *flags]
    assert main(["plan", *arguments]) == 0
    out = capsys.readouterr().out.splitlines()
    result = json.loads(out[-1])
    assert result["fits"] is True and result["total"] == sum(result["terms"].values())
    assert any(line.startswith("largest batch_size that fits") for line in out)


class Asks(torch.nn.Linear):
    """Reads a number in its forward."""

    def forward(self, x):
        return super().forward(x * (2 if x.sum().item() > 0 else 3))


@contextlib.contextmanager
def asking_layers():
    from transformers.models.llama import modeling_llama

    before = modeling_llama.LlamaMLP
    modeling_llama.LlamaMLP = lambda config: Asks(config.hidden_size, config.hidden_size)
    try:
        yield
    finally:
        modeling_llama.LlamaMLP = before


def test_an_architecture_that_cannot_be_traced_says_which_terms_are_missing(folder, capsys):
    with asking_layers():
        plan = planned(folder, targets=["q_proj"])
        assert main(["plan", "--model", folder, "--targets", "q_proj,v_proj", "--rank", "4", "--device", "cpu"]) == 0
    assert plan.fits is None and plan.terms[WEIGHTS] and plan.terms["optimizer"] == 8 * plan.trained
    assert list(plan.uncounted) == ["activations, logits, temporaries"]
    assert "not counted: activations, logits, temporaries" in capsys.readouterr().out


def test_layers_without_a_stand_in_are_named(folder):
    plan = planned(folder, targets=["embed_tokens", "q_proj"])
    assert plan.uncounted == {"activations": "what adapted layers of the kind Embedding keep"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ["q_prj"]}, "did you mean 'q_proj'"),
        ({"model": "no/such/folder"}, "no such model folder"),
        ({"rank": 64}, "larger than its smaller side"),
        ({"memory": -1.0}, "memory is -1.0"),
        ({"method": "dara"}, "did you mean 'dora'"),
        ({"processes": 3}, "batch_size is 4, which 3 processes cannot share equally; give a multiple of 3"),
    ],
)
def test_bad_settings_are_one_line(folder, settings, message):
    with pytest.raises(UserError, match=message):
        planned(folder, **settings)


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        planned(str(tmp_path))
