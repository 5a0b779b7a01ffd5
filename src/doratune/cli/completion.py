"""`doratune completion bash`: what a shell needs to complete commands, settings and their choices with the Tab key.

The script is shtab's, made once from the settings that the commands declare; completing runs no Python. Cost: the imports of all
commands, some seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from typing import Literal

from ..errors import UserError
from ..support.fields import argument_texts
from ..support.values import rule_of
from .arguments import parse
from .description import CommandLine, described
from .main import COMMANDS
from .output import say

EXAMPLE = "doratune completion --shell bash > ~/.local/share/bash-completion/completions/doratune"


@dataclasses.dataclass(kw_only=True)
class CompletionSettings:
    """Print the script that lets a shell complete doratune's commands, settings and choices.

    Args:
        shell: bash, zsh or tcsh. zsh: into a file _doratune in a folder of $fpath
    """

    shell: Literal["bash", "zsh", "tcsh"] = "bash"


def main(argv: list[str]) -> int:
    if argv and not argv[0].startswith("-"):
        argv = ["--shell", *argv]
    settings, _ = parse(CompletionSettings, argv, "completion", EXAMPLE)
    say(script(settings.shell))
    return 0


def script(shell: str) -> str:
    """The completion script of a shell.

    Raises:
        UserError: a shell that shtab does not know.
    """
    import shtab

    if shell not in shtab.SUPPORTED_SHELLS:
        raise UserError(f"shell is {shell!r}; expected one of {', '.join(shtab.SUPPORTED_SHELLS)}")
    return shtab.complete(whole_parser(), shell)


def whole_parser() -> argparse.ArgumentParser:
    """All commands as one parser of the standard library, which parses nothing: it is only looked at."""
    parser = argparse.ArgumentParser("doratune")
    parser.add_argument("--version", action="store_true", help="what runs, and on what")
    commands = parser.add_subparsers()
    for name, what in COMMANDS.items():
        _add_settings(commands.add_parser(name, help=_plain(what)), described(name))
    return parser


def _add_settings(parser: argparse.ArgumentParser, line: CommandLine) -> None:
    import shtab

    from ..training.recipe import methods

    registered = methods()  # not in its type, since new ones can be registered
    parser.add_argument("--json", action="store_true", help="the result as JSON on the last line")
    if line.recipe or line.words:
        words = parser.add_argument(line.words or "recipe", nargs="*" if line.words else "?", help="a file or folder")
        words.complete = shtab.FILE
    if line.settings is None:
        return
    texts, hints = argument_texts(line.settings), typing.get_type_hints(line.settings)
    for field in dataclasses.fields(line.settings):
        known, is_text = _choices(hints[field.name], registered if field.name == "method" else rule_of(field))
        several = "list[" in str(hints[field.name])
        option = parser.add_argument(
            f"--{field.name}", nargs="*" if several else None, choices=known or None, help=_plain(texts.get(field.name, ""))
        )
        if is_text and not known:
            option.complete = shtab.FILE


def _choices(hint, rule) -> tuple[list[str], bool]:
    """(the values that a setting may have, as far as it lists them; whether it may be text)."""
    parts = [hint, *typing.get_args(hint)]
    parts += [inner for part in parts[1:] for inner in typing.get_args(part)]
    if isinstance(rule, tuple | list):
        return list(rule), True
    literals = [value for part in parts if typing.get_origin(part) is Literal for value in typing.get_args(part)]
    if bool in parts:
        literals += ["true", "false"]
    return [str(value) for value in literals], str in parts


def _plain(text: str) -> str:
    """A text that no shell reads as code, and that argparse takes for no format."""
    return "".join(c if c.isalnum() or c in " ,.;/=<>+-_()" else " " for c in text).replace("  ", " ").strip()[:100]
