"""A setting is declared once: what is added to AdapterConfig is a setting of recipes and of doratune inspect."""

import dataclasses
import subprocess
import sys

import pytest

from doratune import AdapterConfig, directions
from doratune.cli.arguments import parse
from doratune.cli.inspect import InspectSettings
from doratune.errors import UserError
from doratune.support.fields import documentation, with_settings_of
from doratune.training.recipe import TrainRecipe

WIDER = '''
from __future__ import annotations
from dataclasses import dataclass
import doratune.config

@dataclass(frozen=True, kw_only=True)
class Wider(doratune.config.AdapterConfig):
    sparsity: float = 0.25
    """Share of B
    that stays 0."""
    silent: tuple[str, ...] = ("lm_head",)
    """Modules that say nothing."""

doratune.config.AdapterConfig = Wider
'''
"""What a change of config.py would be: the rest of the package is loaded after it."""


def run(tmp_path, code: str) -> str:
    (tmp_path / "wider.py").write_text(WIDER)
    return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("command", ["train", "inspect"])
def test_a_new_setting_is_in_every_help(command, tmp_path):
    text = run(tmp_path, f"import wider; from doratune.cli.main import main; main(['{command}', '--help'])")
    words = " ".join(text.split())
    assert "--sparsity SPARSITY Share of B that stays 0. (type: float, default: 0.25)" in words
    assert "Modules that say nothing. (type: list[str], default: ['lm_head'])" in words


def test_a_new_setting_is_in_recipes_and_flags(tmp_path):
    (tmp_path / "own.yaml").write_text("sparsity: 0.5\nsilent: [a, b]\n")
    code = (
        "import wider; from doratune.cli.arguments import parse; from doratune.training.recipe import TrainRecipe\n"
        "print(TrainRecipe().sparsity, TrainRecipe().silent)\n"
        "recipe, _ = parse(TrainRecipe, ['own.yaml', '--rank', '3'], 'train', '', recipe=True)\n"
        "print(recipe.sparsity, recipe.adapter().silent, recipe.adapter().rank)\n"
        "print(parse(TrainRecipe, ['own.yaml', '--sparsity', '0.75', '--silent', 'c'], 'train', '', recipe=True)[0].adapter())\n"
    )
    first, second, third = run(tmp_path, code).splitlines()
    assert first == "0.25 ['lm_head']"
    assert second == "0.5 ['a', 'b'] 3"
    assert third.startswith("Wider(") and "sparsity=0.75, silent=['c']" in third


def test_every_adapter_setting_is_documented_where_it_is_offered():
    texts = documentation(AdapterConfig)
    assert set(texts) == {f.name for f in dataclasses.fields(AdapterConfig)}
    for cls in (TrainRecipe, InspectSettings):
        offered = {f.name: f for f in dataclasses.fields(cls)}
        for f in dataclasses.fields(AdapterConfig):
            assert f"    {f.name}: {texts[f.name]}" in cls.__doc__
            declared = f.default_factory() if f.default is dataclasses.MISSING else f.default
            assert getattr(cls(), f.name) == (list(declared) if isinstance(declared, tuple) else declared)
            assert "tuple" not in str(offered[f.name].type) and "Mapping" not in str(offered[f.name].type)


def test_own_settings_stay_and_follow():
    @dataclasses.dataclass(kw_only=True)
    @with_settings_of(AdapterConfig, after="first")
    class Settings:
        """Some.

        Args:
            first: of its own,
                on two lines
            rank: Also here.
            last: of its own
        """

        first: int = 1
        last: int = 2

    names = [f.name for f in dataclasses.fields(Settings)]
    assert names == ["first", *(f.name for f in dataclasses.fields(AdapterConfig)), "last"]
    assert "    first: of its own,\n        on two lines\n    method: `dora`" in Settings.__doc__
    assert "    rank: R, rows of A and columns of B. Also here.\n    last: of its own" in Settings.__doc__
    assert Settings().rank_overrides is not Settings().rank_overrides


@pytest.fixture
def mine():
    class Mine(type(directions.direction_of("lora"))):
        name = "mine"
        methods = {"mine": False, "dmine": True}

    yield directions.register(Mine())
    directions.unregister("mine")


def test_methods_registered_at_run_time_are_methods_of_a_recipe(mine):
    from doratune.comparison.recipe import CompareRecipe

    recipe, _ = parse(TrainRecipe, ["--method", "dmine", "--data", "x"], "train", "")
    recipe.check()
    assert recipe.adapter().direction == "mine" and recipe.adapter().has_magnitude
    assert CompareRecipe().settings_of("dmine") == {"method": "dmine"}
    with pytest.raises(UserError, match=r"method is 'dmien'; expected one of dora, .*, full, .*did you mean 'dmine'"):
        TrainRecipe(method="dmien", data="x").check()
    with pytest.raises(UserError, match="method is 'full'; expected one of lora, "):
        TrainRecipe(method="full", data="x").adapter()
