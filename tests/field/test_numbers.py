"""Every number of every command has its range and every choice its near misses, in the same words."""

import dataclasses
import math
import typing

import pytest

from doratune import AdapterConfig
from doratune.baselines import BaselineConfig
from doratune.bench.settings import BenchSettings
from doratune.cli.analyze import AnalyzeSettings
from doratune.cli.arguments import parse
from doratune.cli.chat import ChatSettings
from doratune.cli.evaluate import EvaluateSettings
from doratune.cli.export import ExportSettings
from doratune.cli.extract import ExtractSettings
from doratune.cli.generate import GenerateSettings
from doratune.cli.init import InitSettings
from doratune.cli.inspect import InspectSettings
from doratune.cli.main import main
from doratune.cli.merge import MergeSettings
from doratune.cli.report import ReportSettings
from doratune.comparison.recipe import CompareRecipe
from doratune.demo.settings import DemoSettings
from doratune.errors import UserError
from doratune.support.values import Range, check_value, rule_of
from doratune.training.recipe import TrainRecipe

COMMANDS = {
    "train": TrainRecipe, "demo": DemoSettings, "evaluate": EvaluateSettings, "merge": MergeSettings, "compare": CompareRecipe,
    "analyze": AnalyzeSettings, "report": ReportSettings, "inspect": InspectSettings, "bench": BenchSettings,
    "export": ExportSettings, "extract": ExtractSettings, "generate": GenerateSettings, "chat": ChatSettings,
    "init": InitSettings,
}  # fmt: skip
RECIPES = ("train", "compare")
FREE = {"seeds"}  # whole numbers of any sign; each cell's own seed is checked


def fields_of(kind) -> list[tuple[str, str, object]]:
    """(command, field, inner type) of every field that holds numbers or choices."""
    found = []
    for command, cls in COMMANDS.items():
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            flat = [hints[f.name], *typing.get_args(hints[f.name])]
            flat += [inner for part in flat for inner in typing.get_args(part)]
            if kind == "number" and (int in flat or float in flat):
                found.append((command, f.name, float if float in flat else int))
            if kind == "choice" and (literals := [p for p in flat if typing.get_origin(p) is typing.Literal]):
                found.append((command, f.name, typing.get_args(literals[0])))
    return found


NUMBERS, CHOICES = fields_of("number"), fields_of("choice")


def refused(command: str, capsys, *flags: str) -> str:
    assert main([command, *flags]) == 2, (command, flags)
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and len(error) < 500
    for inner in ("subtype", "Union", "class '", "Traceback", "typing", "NoneType", "argument"):
        assert inner not in error, error
    return error


@pytest.mark.parametrize(("command", "name", "kind"), NUMBERS)
def test_every_number_of_every_command_declares_its_range(command, name, kind):
    rule = rule_of(next(f for f in dataclasses.fields(COMMANDS[command]) if f.name == name))
    assert name in FREE or isinstance(rule, Range)


@pytest.mark.parametrize(("command", "name", "kind"), NUMBERS)
def test_no_number_of_any_command_is_nan_infinite_true_text_or_beyond_its_range(command, name, kind, capsys):
    wrong = ["true", ".nan", ".inf", "-.inf", "nan", "many", "9" * 400, "1e999"]
    wrong += [] if name in FREE else ["-7", "-1e-4"]
    wrong += ["1.5"] if kind is int else []
    for value in wrong:
        value = f"{{x: {value}}}" if name.endswith("_overrides") else value
        for flags in ([f"--{name}", value], [f"--{name}={value}"]):
            error = refused(command, capsys, *flags)
            assert error.startswith(f"doratune {command}: {name} ") and "; expected " in error and "number" in error, error


@pytest.mark.parametrize(("command", "name", "known"), CHOICES)
def test_every_choice_names_what_there_is_and_near_misses(command, name, known, capsys):
    error = refused(command, capsys, f"--{name}", f"{known[0]}x")
    assert f"'{known[0]}x'; expected one of {', '.join(known)}" in error
    assert f"did you mean '{known[0]}'" in error or len(known[0]) < 3, error


@pytest.mark.parametrize(
    ("command", "flags", "words"),
    [
        ("train", ["--max_steps", "0"], "max_steps is 0; expected a whole number of at least 1, or -1 for no limit"),
        ("demo", ["--max_steps", "-5"], "max_steps is -5; expected a whole number of at least 1, or -1 for no limit"),
        ("train", ["--epochs", ".inf"], "epochs is inf; expected"),
        ("train", ["--lr", "-1e-4"], "lr is -0.0001; expected a positive number"),
        ("train", ["--max_grad_norm", ".nan"], "max_grad_norm is nan; expected a number, 0 or more"),
        ("merge", ["--into", "gguf"], "into is 'gguf'; expected one of dequantized, original, same"),
        ("merge", ["--dtype", "bfloat"], "did you mean 'bfloat16'"),
        ("train", ["--dropout", "1"], "dropout is 1; expected a number from 0 up to, not including, 1"),
        ("bench", ["--ranks", "4", "0"], "ranks holds 0; expected whole numbers of at least 1"),
        ("compare", ["--lrs", "1e-3", "-1e-3"], "lrs holds -0.001; expected positive numbers"),
        ("compare", ["--confidence", "95"], "confidence is 95; expected a number between 0 and 1"),
        ("train", ["--lr"], "--lr has no value"),
        ("train", ["--tensorboard", "maybe"], "tensorboard is 'maybe'; expected true or false"),
        ("train", ["--seed", "2147483648"], "seed is 2147483648; expected a whole number from 0 to 2147483647"),
        ("train", ["--batch_size", "99999999999"], "batch_size is 99999999999; expected a whole number from 1 to 2147483647"),
    ],
)
def test_the_words(command, flags, words, capsys):
    assert words in refused(command, capsys, *flags)


def test_a_recipe_is_held_to_the_same(tmp_path, capsys):
    for line, words in (
        ("lr: -1e-4", "lr is -0.0001; expected a positive number"),
        ("epochs: .inf", "epochs is inf"),
        ("batch_size: true", "batch_size is True; expected a whole number"),
        ("rank_overrides: {q_proj: .nan}", "rank_overrides holds nan; expected whole numbers of at least 1"),
        ("schedule: linaer", "did you mean 'linear'"),
    ):
        (tmp_path / "r.yaml").write_text(line + "\n")
        assert words in refused("train", capsys, str(tmp_path / "r.yaml"))
        with pytest.raises(UserError):
            parse(TrainRecipe, ["--config", str(tmp_path / "r.yaml")], "train", "", recipe=True)


@pytest.mark.parametrize(
    ("flags", "values"),
    [
        (["--lr", "1e-4", "--max_steps", "-1"], {"lr": 1e-4, "max_steps": -1}),
        (["--weight_decay", "0", "--epochs", "0.5"], {"weight_decay": 0, "epochs": 0.5}),
        (["--targets", "q_proj,v_proj", "--limit", "null"], {"targets": ["q_proj", "v_proj"], "limit": None}),
        (["--rank_overrides", "{q_proj: 4}", "--alpha_overrides", "{q_proj: 1.5}"], {"rank_overrides": {"q_proj": 4}}),
        (["--data", "-odd.json", "--resume", "--overwrite", "false"], {"data": "-odd.json", "resume": True, "overwrite": False}),
        (["--tasks", "a", "b", "--alpha", "8"], {"tasks": ["a", "b"], "alpha": 8}),
    ],
)
def test_what_is_right_is_taken(flags, values):
    settings, _ = parse(TrainRecipe, flags, "train", "")
    assert {name: getattr(settings, name) for name in values} == values


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "4", 0, -1, 10**400, None, [4]])
def test_the_adapters_own_numbers(value):
    for cls, name in ((AdapterConfig, "rank"), (AdapterConfig, "alpha"), (TrainRecipe, "lr"), (TrainRecipe, "batch_size")):
        if value is None and name == "alpha":
            continue
        with pytest.raises(UserError, match=f"{name} is .*; expected"):
            cls(**{name: value} | ({"data": "x"} if cls is TrainRecipe else {})).check()
    for name in ("rank_overrides", "alpha_overrides"):
        with pytest.raises(UserError, match=f"{name} holds .*; expected"):
            AdapterConfig(**{name: {"q_proj": value}})
    with pytest.raises(UserError, match="scaling is"):
        BaselineConfig(method="series", scaling=value)


def test_a_direction_s_own_settings():
    from doratune import directions

    class Scaled(type(directions.direction_of("lora"))):
        name, methods, settings = "scaled", {"scaled": False}, {"share": 0.25, "count": 2, "on": True}

    directions.register(Scaled())
    try:
        for name, value in (("share", math.nan), ("count", 2.5), ("count", True), ("on", 1)):
            with pytest.raises(UserError, match=f"direction_settings: {name} is "):
                AdapterConfig(method="scaled", direction_settings={name: value})
        assert AdapterConfig(method="scaled", direction_settings={"share": 1}).setting("share") == 1
    finally:
        directions.unregister("scaled")


def test_unions_lists_and_mappings():
    check_value("x", None, int | None, Range(least=1))
    check_value("x", (1, 2), tuple[int, ...] | str, Range(least=1))
    with pytest.raises(UserError, match=r"x holds 0; expected whole numbers of at least 1"):
        check_value("x", [1, 0], list[int] | str, Range(least=1))
    with pytest.raises(UserError, match=r"x is 5; expected text or a list"):
        check_value("x", 5, str | list[str])
    with pytest.raises(UserError, match="of too many digits"):
        check_value("x", 10**5000, float)
