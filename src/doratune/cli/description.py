"""What a command can be told, without running it: asked for as its only argument, answered by an exception.

A command's settings are a dataclass that only its own file names; `parse` meets it before anything else happens. So what lists the
settings of all commands (shell completion) needs no second list. Standard library only: `doratune doctor` runs on the core alone.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

DESCRIBE = "--describe-settings"


@dataclass(frozen=True)
class CommandLine:
    """What may stand behind a command.

    Args:
        settings: the dataclass of its settings; None where it has none.
        recipe: may the first word be a file of settings?
        words: the setting that takes words which stand after no flag.
    """

    settings: type | None = None
    recipe: bool = False
    words: str | None = None


class Described(Exception):
    """The answer to DESCRIBE."""

    def __init__(self, line: CommandLine):
        super().__init__(line)
        self.line = line


def answer(argv: list[str], line: CommandLine) -> None:
    """Raise Described where that is all that is asked."""
    if argv == [DESCRIBE]:
        raise Described(line)


def described(command: str) -> CommandLine:
    """What may stand behind a command of `COMMANDS`. Cost: its imports."""
    try:
        importlib.import_module(f".{command}", __package__).main([DESCRIBE])
    except Described as found:
        return found.line
    raise AssertionError(f"doratune {command} reads its arguments without cli.arguments.parse")
