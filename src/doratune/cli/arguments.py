"""Options of a command from a dataclass, by jsonargparse: defaults < YAML file < flags; types from the annotations.

Every value is held against its setting's type and range first (`support.values`), so that all commands refuse in the same words;
unknown keys and flags are named with their near misses. A boolean flag needs no value, a word after any other flag is its value
(`--lr -1e-4`), a list takes words (`--arms lora dora`), commas (`--arms lora,dora`) or YAML (`--arms '[lora, dora]'`).
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..errors import UserError
from ..support.patterns import is_name
from ..support.recipes import recipe_file
from ..support.values import check_value, check_values, rule_of, shown
from ..support.yaml_text import parse_yaml, read_yaml
from .description import CommandLine, answer
from .other_names import instead
from .output import say_help

T = TypeVar("T")

MODULES = ("targets", "exclude", "magnitude_only", "also_train", "baseline_targets")
"""Settings of modules: a list of names, or a text that is a regular expression or all-linear. One name is a list here."""

_NAMES = re.compile(r"[\w.-]+(,[\w.-]+)+")
"""Names with commas between them: no regular expression that could mean anything else."""

_TABLES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst")
"""Endings of data files that are no YAML, for who gives the data in the recipe's place, as other commands take it."""


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
    answer(argv, CommandLine(cls, recipe, words))
    fields = {f.name: f for f in dataclasses.fields(cls)}
    as_json = "--json" in argv
    argv = [a for a in argv if a != "--json"]
    parser = _parser(cls, command, example, recipe, words)
    if recipe and argv and not argv[0].startswith("-"):
        argv = ["--config", *argv]
    argv, loose = _loose_words(argv, fields) if words else (argv, [])
    argv = _one_word_lists(_plain_flags(argv, fields, {"config"} if recipe else set()), fields)
    argv = [f"--config={recipe_file(a[9:])}" if a.startswith("--config=") else a for a in argv]
    hints = typing.get_type_hints(cls)
    for name, value in _values(argv, fields):
        _check_given(name, value, hints[name], rule_of(fields[name]))
    namespace = _parse(parser, argv)
    values = {name: namespace[name] for name in fields}
    values |= {name: [values[name]] for name in MODULES if name in fields and _is_one_name(values[name])}
    if loose:
        values[words] = [*loose, *values[words]]
    settings = cls(**values)
    check_values(settings)
    _check_named(settings)
    return settings, as_json


def _check_named(settings) -> None:
    """Refuse an empty text where the setting has a name by default, such as a folder's."""
    for field in dataclasses.fields(settings):
        if getattr(settings, field.name) == "" and isinstance(field.default, str) and field.default:
            raise UserError(f"{field.name} is empty; give --{field.name} VALUE, or leave it out for {field.default}")


def _is_one_name(value: Any) -> bool:
    return is_name(value) and not value.startswith("all-")


def _parser(cls: type, command: str, example: str, recipe: bool, words: str | None):
    from jsonargparse import ArgumentParser, set_loader, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=False)
    set_loader("settings", parse_yaml, (yaml.YAMLError,))
    before = "[RECIPE.yaml] " if recipe else f"{words.removesuffix('s').upper()}… " if words else ""
    usage = f"doratune {command} {before}[--SETTING VALUE …] [--json]"
    parser = ArgumentParser(
        prog=f"doratune {command}",
        usage=usage,
        epilog=f"example: {example}",
        exit_on_error=False,
        parser_mode="settings",
        print_config=None,
    )
    say_help(parser)
    if recipe:
        parser.add_argument("--config", action="config", help="a YAML file of settings; also the first argument")
    parser.add_class_arguments(cls)
    for action in parser._actions:  # --data+, which appends to a list: `_plain_flags` refuses it
        action.option_strings = [name for name in action.option_strings if not name.endswith("+")]
    return parser


def _parse(parser, argv: list[str]):
    from jsonargparse import ArgumentError

    try:
        return parser.parse_args(argv)
    except ArgumentError as error:  # of the whole line: a word that belongs to no flag
        raise UserError(" ".join(str(error).split())) from None


def _values(argv: list[str], fields) -> Iterator[tuple[str, Any]]:
    """(setting, value) of each recipe and flag, in the order in which they count."""
    for argument in argv:
        name, equals, value = argument.removeprefix("--").partition("=")
        if name == "config" and not value:
            raise UserError("--config has no value; give --config RECIPE.yaml")
        if name == "config":
            yield from _settings_of(Path(value), fields).items()
        elif name in fields and equals:
            yield name, value
        elif name in fields:
            raise UserError(f"--{name} has no value; give --{name} VALUE")


def _check_given(name: str, value: Any, hint: Any, rule) -> None:
    """Hold a value against its setting, as it is written and, where it is text, as YAML reads it."""
    read = value
    if isinstance(value, str):
        try:
            read = parse_yaml(value)
        except yaml.YAMLError:
            read = value
    try:
        check_value(name, value, hint, rule)
    except UserError:
        check_value(name, read, hint, rule)


def _settings_of(path: Path, fields) -> dict:
    """The settings in a recipe.

    Raises:
        UserError: not readable, or with a key that is no setting.
    """
    if "data" in fields and path.suffix.lower() in _TABLES and path.is_file():
        raise UserError(f"{path} is a file of data, where a recipe is expected; give --data {path}")
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings; expected lines of the form key: value")
    for key in content:
        if key not in fields:
            raise UserError(f"{path}: unknown setting {shown(key)}{instead(str(key), fields)}")
    return content


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
    """Refuse unknown flags; a boolean flag without a value is true, and any other flag takes the word behind it, whatever it
    begins with: argparse would take -1e-4 for a flag."""
    out, rest = [], list(argv)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or argument == "--help":
            out.append(argument)
            continue
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        if name not in fields and name not in extra:
            raise UserError(f"unknown setting --{name}{instead(name, fields)}")
        has_value = bool(rest) and not rest[0].startswith("--")
        if name in fields and fields[name].type in (bool, "bool") and not equals and not has_value:
            equals, value = "=", "true"
        elif not equals and has_value and not (name in fields and "list[" in str(fields[name].type)):
            equals, value = "=", rest.pop(0)
        out.append(f"--{name}{equals}{value}")
    return out


def _yaml_list(words: list[str], kind: str) -> str:
    """Words as a YAML list. Texts are quoted, so that nothing in them is YAML; names with commas between them are several."""
    if kind != "list[str]":
        return f"[{','.join(words)}]"
    texts = [text for word in words for text in (word.split(",") if _NAMES.fullmatch(word) else [word])]
    return json.dumps(texts, ensure_ascii=False)


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
            value = (
                words[0] if len(words) == 1 and words[0].startswith("[") else _yaml_list(words, str(field.type)) if words else ""
            )
            equals = "=" if words else ""  # none: `_values` says so
        elif field and "list[" in str(field.type):
            words = [value] if equals else []
            while rest and not rest[0].startswith("--"):
                words.append(rest.pop(0))
            equals = "=" if words else ""  # none: `_values` says so
            value = words[0] if len(words) == 1 else _yaml_list(words, "list[str]") if words else ""
            value = f"[{value}]" if _NAMES.fullmatch(value) else value
        out.append(name + equals + value)
    return out
