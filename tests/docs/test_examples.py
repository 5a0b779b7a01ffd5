"""The examples of the documentation: marked blocks run, page by page, on a tiny model; every command line names what there is."""

import contextlib
import dataclasses
import io
import json
import re
import shlex
import shutil
import subprocess
import typing
from functools import cache

import pytest
from pages import PAGES, ROOT, commands, marks, runnable, text_of

from doratune.cli.description import described
from doratune.cli.main import COMMANDS, main
from doratune.errors import UserError
from doratune.support.values import check_value, rule_of
from doratune.support.yaml_text import parse_yaml

WITH_EXAMPLES = [page for page in PAGES if marks(page)]


@pytest.fixture
def desk(tmp_path, monkeypatch, tiny_folder):
    """A folder as the pages assume it: a model `my-model`, instruction data `my.jsonl`, preference pairs `pairs.json`."""
    shutil.copytree(tiny_folder, tmp_path / "my-model")
    towns = {"Norway": "Oslo", "Peru": "Lima", "Kenya": "Nairobi", "Japan": "Tokyo", "Cuba": "Havana", "Chad": "N'Djamena"}
    items = [{"instruction": f"Which town is the capital of {land}?", "input": "", "output": town} for land, town in towns.items()]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    pairs = [{"prompt": item["instruction"], "chosen": item["output"], "rejected": "No town."} for item in items]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_python(text: str, names: dict, where: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(text, where, "exec"), names)


def run_bash(text: str) -> None:
    """Line by line; doratune's own commands run in this process, which has its imports already."""
    lines = iter(re.sub(r"\\\n\s*", "", text).splitlines())
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        if here := re.search(r"<<(\w+)$", line):
            while (following := next(lines)) != here[1]:
                line += "\n" + following
            line += "\n" + here[1]
        words = shlex.split(line.split("\n")[0], comments=True)
        if words[0] == "doratune":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                assert main(words[1:]) == 0, f"{line}\n{output.getvalue()[-1000:]}"
        else:
            subprocess.run(["bash", "-ec", line], check=True, timeout=60)


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.name)
def test_the_marked_blocks_of_a_page_run(page, desk):
    names: dict = {"__name__": "example"}
    blocks = runnable(page)
    assert len(blocks) == marks(page), "a mark stands right above a fenced block of python or bash"
    for block in blocks:
        if block.language == "python":
            run_python(block.text, names, f"{page.name}:{block.line}")
        else:
            run_bash(block.text)


def test_enough_pages_have_examples_that_run():
    assert {"README.md", "first_run.md", "migrating.md", "extending.md"} <= {page.name for page in WITH_EXAMPLES}


@cache
def settings_of(command: str) -> set[str]:
    line = described(command)
    names = {field.name for field in dataclasses.fields(line.settings)} if line.settings else set()
    return names | {"json", "help"} | ({"config"} if line.recipe else set())


def problem(line: str) -> str | None:
    """What is wrong with a command line; None where nothing is."""
    words = line.split()
    command = words[1] if len(words) > 1 else ""
    if command.startswith("--") or not re.fullmatch(r"[a-z]+", command):
        return None  # doratune --version, doratune COMMAND
    if command not in COMMANDS:
        return f"no command {command}"
    flags = re.findall(r"(?<!\S)--([A-Za-z_-]+)", line)
    unknown = {flag.replace("-", "_") for flag in flags} - settings_of(command)
    if unknown:
        return f"{command} has no {', '.join(sorted(unknown))}"
    return next((wrong for name, values in with_values(line) if (wrong := wrong_value(command, name, values))), None)


def with_values(line: str) -> list[tuple[str, list[str]]]:
    """(flag, the words behind it) of a command line."""
    try:
        words = shlex.split(line)
    except ValueError:  # a quotation that the page cuts
        return []
    found = []
    for word in words:
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            found.append((name[2:].replace("-", "_"), [value] if equals else []))
        elif found:
            found[-1][1].append(word)
    return found


def wrong_value(command: str, name: str, values: list[str]) -> str | None:
    """What a setting says of a value in the pages: a word that is none of its choices, a number out of its range."""
    settings = described(command).settings
    field = next((one for one in dataclasses.fields(settings) if one.name == name), None) if settings else None
    if field is None or not values or values[0].isupper() or "…" in values[0]:  # FILE, M, 0.…
        return None
    problems = []
    for value in (values[0], parse_yaml(values[0]), values):
        try:
            return check_value(name, value, typing.get_type_hints(settings)[name], rule_of(field))
        except UserError as error:
            problems.append(str(error))
    return problems[1]


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "recipes").glob("*.yaml"))], ids=lambda page: page.name)
def test_every_command_line_is_one(page):
    if page.suffix == ".yaml":
        found = [(i, line[1:].strip()) for i, line in enumerate(text_of(page).splitlines(), 1) if line.startswith("# doratune ")]
    else:
        found = commands(page)
    assert [f"{page.name}:{number}: {wrong}" for number, line in found if (wrong := problem(line))] == []


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("doratune trane x.yaml", "no command trane"),
        ("doratune train x.yaml --rnk 3", "train has no rnk"),
        ("doratune merge --adapter a --outptu b", "merge has no outptu"),
        ("doratune merge --adapter a --into orignal", "into is 'orignal'; expected one of"),
        ("doratune train r.yaml --rank 0", "rank is 0; expected a whole number"),
        ("doratune train r.yaml --quantize=nf5", "quantize is 'nf5'"),
        ("doratune train r.yaml --targets q_proj v_proj --rank 4", None),
        ("doratune evaluate --adapter a --task '[boolq, piqa]'", None),
        ("doratune --version", None),
    ],
)
def test_the_check_sees_what_it_should(line, wrong):
    assert problem(line) == wrong if wrong is None else problem(line).startswith(wrong)
