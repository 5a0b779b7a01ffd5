"""Options of a command from a dataclass, by jsonargparse: defaults < YAML file < flags; types from the annotations.

Unknown keys and flags are found here first, so that the message can name near misses; a boolean flag needs no value, a
list takes words (`--arms lora dora`), commas (`--arms lora,dora`) or YAML (`--arms '[lora, dora]'`).
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TypeVar

import yaml

from ..errors import UserError, near_misses

T = TypeVar("T")

_NAMES = re.compile(r"[\w.-]+(,[\w.-]+)+")
"""Names with commas between them: no regular expression that could mean anything else."""


def parse(
    cls: type[T], argv: list[str], command: str, example: str, recipe: bool = False, words: str | None = None
) -> tuple[T, bool]:
    """(settings, whether --json was given).

    Args:
        recipe: the first argument may be a YAML file of settings.
        words: the list setting that takes words which stand after no flag: `doratune analyze runs/a runs/b`.

    Raises:
        UserError: an unknown key, a value of the wrong type, a recipe file that is not there.
        SystemExit: after --help.
    """
    from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=False)
    before = "[RECIPE.yaml] " if recipe else f"{words.removesuffix('s').upper()}… " if words else ""
    usage = f"doratune {command} {before}[--SETTING VALUE …] [--json]"
    parser = ArgumentParser(prog=f"doratune {command}", usage=usage, epilog=f"example: {example}", exit_on_error=False)
    if recipe:
        parser.add_argument("--config", action="config", help="a YAML file of settings; also the first argument")
    parser.add_class_arguments(cls)
    as_json = "--json" in argv
    argv = [a for a in argv if a != "--json"]
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if recipe and argv and not argv[0].startswith("-"):
        _check_recipe(Path(argv[0]), fields)
        argv = ["--config", *argv]
    argv, loose = _loose_words(argv, fields) if words else (argv, [])
    argv = _one_word_lists(_plain_flags(argv, fields, {"config"} if recipe else set()), fields)
    try:
        namespace = parser.parse_args(argv)
    except ArgumentError as error:
        raise UserError(_in_words(" ".join(str(error).split()), fields)) from None
    values = {name: namespace[name] for name in fields}
    if loose:
        values[words] = [*loose, *values[words]]
    return cls(**values), as_json


def _in_words(message: str, fields) -> str:
    """jsonargparse's message about a value of the wrong type, as: which setting, which value, what is expected."""
    match = re.search(r'key "(\w+)":.*Got value: (.*?)(?: Given value type.*)?$', message)
    if not match or match[1] not in fields:
        return message
    name, value = match[1], match[2].strip()
    text = str(fields[name].type)
    if choices := re.search(r"Literal\[([^\]]*)\]", text):
        known = [choice.strip().strip("'\"") for choice in choices[1].split(",")]
        return f"{name} is {value!r}; expected one of {', '.join(known)}{near_misses(value, known)}"
    words = (("bool", "true or false"), ("list", "a list"), ("dict", "a mapping"), ("int", "a whole number"), ("float", "a number"))
    return f"{name} is {value!r}; expected {next((word for key, word in words if key in text), text)}"


def _check_recipe(path: Path, fields) -> None:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe; see recipes/ for examples") from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not a readable YAML file ({getattr(error, 'problem', None) or error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings; expected lines of the form key: value")
    for key in content:
        if key not in fields:
            raise UserError(f"{path}: unknown setting {key!r}{near_misses(key, fields)}")


def _loose_words(argv: list[str], fields) -> tuple[list[str], list[str]]:
    """(flags with their values, the words that belong to no flag). They are paths, so nothing in them is read as YAML."""
    flags, loose, rest = [], [], list(argv)
    while rest:
        if not rest[0].startswith("-"):
            loose.append(rest.pop(0))
            continue
        flags.append(rest.pop(0))
        name, equals, _ = flags[-1][2:].partition("=")
        kind = str(getattr(fields.get(name.replace("-", "_")), "type", ""))
        takes = len(rest) if kind.startswith("list[") else 0 if equals else 1
        while takes and rest and not rest[0].startswith("-") and ("bool" not in kind or rest[0] in ("true", "false")):
            flags.append(rest.pop(0))
            takes -= 1
    return flags, loose


def _plain_flags(argv: list[str], fields, extra: set[str]) -> list[str]:
    """Refuse unknown flags, and give boolean flags without a value the value true."""
    out = []
    for position, argument in enumerate(argv):
        if argument.startswith("--") and argument != "--help":
            name = argument[2:].split("=")[0].replace("-", "_")
            if name not in fields and name not in extra:
                raise UserError(f"unknown setting --{name}{near_misses(name, fields)}")
            argument = f"--{name}" + argument[2 + len(name) :]
            following = argv[position + 1] if position + 1 < len(argv) else "--"
            if name in fields and fields[name].type in (bool, "bool") and "=" not in argument and following.startswith("--"):
                argument += "=true"
        out.append(argument)
    return out


def _one_word_lists(argv: list[str], fields) -> list[str]:
    """Join the words after a flag that takes a list, and nothing else, into one YAML list."""
    out, rest = [], list(argv)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        field = fields.get(name[2:]) if name.startswith("--") else None
        if field and str(field.type).startswith("list["):
            words = [value] if equals else []
            while rest and not rest[0].startswith("--"):
                words.append(rest.pop(0))
            value = words[0] if len(words) == 1 and words[0].startswith("[") else f"[{','.join(words)}]"
            equals = "="
        elif field and "list[" in str(field.type) and not equals and rest and _NAMES.fullmatch(rest[0]):
            equals, value = "=", f"[{rest.pop(0)}]"
        elif field and "list[" in str(field.type) and equals and _NAMES.fullmatch(value):
            value = f"[{value}]"
        out.append(name + equals + value)
    return out
