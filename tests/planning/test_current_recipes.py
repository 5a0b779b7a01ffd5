"""The recipes of current models: their shapes on the meta device, what they train, the memory that they state, ten real steps."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml
from conftest import small_tokenizer
from current_models import MODELS

from doratune.cli.main import main
from doratune.planning.architecture import architecture_of, stored_bytes
from doratune.planning.plan import Planner
from doratune.planning.settings import PlanSettings
from doratune.planning.start import RESERVE

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
TRACED = tuple(MODELS) if os.environ.get("DORATUNE_PLANS") == "all" else ("llama3.2_1b",)
"""Models whose step is traced again: 20 s for each billion of the large ones; DORATUNE_PLANS=all traces every one."""


def recipe_of(name: str) -> dict:
    return yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))


def settings_of(name: str) -> PlanSettings:
    return PlanSettings(**recipe_of(name), data="any", memory=MODELS[name].memory * (1 - RESERVE), largest="none")


def stated(name: str) -> tuple[float, int]:
    """(GiB on each device, numbers trained) as the recipe states them."""
    gib, trained = re.match(r"([\d.]+) GiB planned on each device; ([\d,]+) numbers trained", recipe_of(name)["expected"]).groups()
    return float(gib), int(trained.replace(",", ""))


@pytest.mark.parametrize("name", MODELS)
def test_targets_exist_and_parameters_are_counted(name):
    model, settings = MODELS[name], settings_of(name)
    settings.check()
    built = architecture_of(settings, model.config())
    assert sum(p.numel() for p in built.model.parameters()) == model.total
    assert len(built.adapters) == 7 * model.layers  # q, k, v, o, gate, up, down of each block, and no head
    weights, _, trained = stored_bytes(built)
    gib, said = stated(name)
    assert trained == said
    share = settings.processes if settings.fsdp == "shard" else 1
    assert weights / share < gib * 2**30 <= model.memory * (1 - RESERVE) * 2**30


@pytest.mark.parametrize("name", TRACED)
def test_the_memory_stated_is_the_plan_s(name):
    plan = Planner(settings_of(name), MODELS[name].config()).plan()
    assert round(plan.total / 2**30, 2) == stated(name)[0] and plan.fits and not plan.uncounted


@pytest.mark.parametrize("name", ["qwen3_0.6b", "gemma3_1b", "llama3.2_1b", "smollm3_3b", "ministral_8b"])
def test_ten_steps_at_a_shrunken_size(name, tmp_path):
    """Each class once, by its recipe; only the model, the data and what an accelerator's memory asked for are others."""
    from transformers import AutoModelForCausalLM

    config = MODELS[name].config()
    config.update({"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300, "head_dim": 32})
    config.update({"num_attention_heads": 2, "num_key_value_heads": 1, "layer_types": ["full_attention"] * 2, "pad_token_id": 0})
    if hasattr(config, "no_rope_layers"):
        config.no_rope_layers = config.no_rope_layers[:2]
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    small_tokenizer().save_pretrained(tmp_path / "model")
    items = [{"instruction": f"Is {i} even?", "output": f"it is {('true', 'false')[i % 2]}"} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    words = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data.jsonl"), "--output", str(tmp_path / "run")]
    words += ["--max_steps", "10", "--max_length", "256", "--quantize", "none", "--lr", "1e-3", "--gradient_accumulation", "2"]
    assert main(["train", "--config", str(RECIPES / f"{name}.yaml"), *words]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    losses = [row["loss"] for row in metrics["log"] if "loss" in row]
    assert metrics["steps"] == 10 == len(losses) and losses[-1] < losses[0] and metrics["magnitude_moved"] > 0
