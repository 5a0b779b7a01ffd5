"""YAML that unfolds to gigabytes or to thousands of levels, in every command that reads YAML: one line, at once."""

import time

import pytest
import yaml

from doratune.cli.main import main
from doratune.errors import UserError
from doratune.report.read import read_run
from doratune.support.yaml_text import as_read_back, parse_yaml, read_yaml, to_yaml
from doratune.training.recipe import TrainRecipe
from doratune.training.resume import check_same

NINE = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi"))
BOMBS = {
    "aliases": "a: &a [x, x, x, x, x, x, x, x, x]\n" + NINE,
    "merged mappings": "a: &a {" + ", ".join(f"k{i}: 1" for i in range(400)) + "}\n" + "".join(
        f"{b}: &{b} {{" + ", ".join(f"{b}{i}: *{a}" for i in range(20)) + "}\n" for a, b in zip("abcd", "bcde")
    ),
    "brackets": "a: " + "[" * 5000 + "]" * 5000,
    "unclosed brackets": "[" * 100_000,
    "dashes": "- " * 5000 + "x",
    "keys": "a: " + "{b: " * 2000,
    "holds itself": "a: &a [*a]",
    "digits": "rank: " + "9" * 6000,
}  # fmt: skip


@pytest.mark.parametrize("kind", BOMBS)
def test_is_refused_at_once(kind, tmp_path):
    (tmp_path / "x.yaml").write_text(BOMBS[kind])
    started = time.perf_counter()
    with pytest.raises(UserError, match="not a readable YAML file") as caught:
        read_yaml(tmp_path / "x.yaml")
    assert time.perf_counter() - started < 5
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("command", ["train", "compare", "compare's recipe", "demo", "resume", "report"])
def test_in_every_command_that_reads_yaml(command, kind, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(BOMBS[kind])
    if command == "report":
        warnings = []
        assert read_run(tmp_path, "run", None, warnings.append).recipe == {}
        assert "not a readable YAML file" in " ".join(warnings)
        return
    if command == "resume":
        with pytest.raises(UserError, match="not a readable YAML file"):
            check_same(TrainRecipe(), path)
        return
    words = {"demo": ["--recipe", str(path)], "compare's recipe": ["--recipe", str(path)]}.get(command, [str(path)])
    assert main([command.split("'")[0], *words]) == 2
    error = capsys.readouterr().err
    assert "not a readable YAML file" in error and error.count("\n") == 1


@pytest.mark.parametrize("flag", ["--targets", "--rank", "--rank_overrides", "--tasks"])
def test_in_a_flag(flag, tmp_path, capsys):
    for value in ("[" * 3000, BOMBS["aliases"].replace("\n", " ")):
        assert main(["train", "--data", str(tmp_path / "none.json"), flag, value]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_what_people_write_is_read(tmp_path):
    shared = "shared: &lr 1e-3\nlist: [*lr, *lr]\nmap: &m {rank: 4}\nother: {<<: *m, lr: 2E-4}\nday: 2024-01-01\nyes: true\n"
    value = parse_yaml(shared)
    assert value["list"] == [1e-3, 1e-3] and value["other"] == {"rank": 4, "lr": 2e-4} and value["day"] == "2024-01-01"
    deep = "x: " + "[" * 20 + "]" * 20
    assert parse_yaml(deep)
    same = {"a": 1}
    assert as_read_back({"x": same, "y": same, "z": [same] * 50}) == {"x": same, "y": same, "z": [same] * 50}


WORDS = ["1e-3", "2024-01-01", ".5", "1_000", "true", "~", "", "a: b", "- x", "\u2028", "007", "1:30", "1E+5"]


@pytest.mark.parametrize("text", WORDS)
def test_text_stays_text_for_every_reader(text):
    assert parse_yaml(to_yaml({"name": text})) == yaml.safe_load(to_yaml({"name": text})) == {"name": text}
    assert parse_yaml(to_yaml([text], flow=True)) == [text]


@pytest.mark.parametrize(
    "text", ["rank: 4\nlr: 1e-3\nrank: 8\n", "a: {b: 1, b: 2}", "x:\n- {lr: 1}\n- {lr: 1, lr: 1}\n", "'rank': 4\nrank: 8\n"]
)
def test_a_key_that_stands_twice(text, tmp_path, capsys):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=r"line \d: .* stands there twice"):
        read_yaml(tmp_path / "x.yaml")
    assert main(["train", str(tmp_path / "x.yaml"), "--data", "demo"]) == 2
    assert "stands there twice; leave one of the two" in capsys.readouterr().err


def test_keys_that_a_merge_brings_may_be_there_too():
    text = "a: &a {lr: 1, rank: 2}\nb: &b\n  <<: *a\n  rank: 4\nc:\n  <<: [*b, *a]\n  lr: 3\n1: x\n'1': y\n"
    assert parse_yaml(text) == {
        "a": {"lr": 1, "rank": 2}, "b": {"lr": 1, "rank": 4}, "c": {"lr": 3, "rank": 4}, 1: "x", "1": "y",
    }  # fmt: skip
