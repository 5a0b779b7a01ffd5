"""What commands share: where lines go, the last line in JSON, a progress bar, and memory that the process keeps."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from ..errors import UserError
from ..support.allocator import keep_freed_memory as keep_freed_memory
from ..support.progress import Advance


def say(line: str) -> None:
    """One line of a report, on standard output at once."""
    print(line, flush=True)


def say_help(parser) -> None:
    """Let --help of an argparse parser fail as any output does: argparse itself is silent about a full disk or a closed pipe."""
    parser.print_help = lambda file=None: print(parser.format_help(), end="", file=file)


def refuse_in_one_line(parser) -> None:
    """Let what an argparse parser refuses be one line, as everywhere, instead of its usage and a line."""

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; {parser.prog} --help shows what there is")

    parser.error = refuse


def say_next(*commands: Sequence[str]) -> None:
    """The last line of a report: what can be run next, as one would type it."""
    say("next: " + " | ".join(shlex.join(["doratune", *map(str, words)]) for words in commands))


def print_json(value) -> None:
    """The machine-readable result: one document on the last line of standard output."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Advance]:
    """A progress bar with items a second, on standard error, which is full once all is done; where `total` is not known yet (0),
    from the first item on."""
    from tqdm.auto import tqdm

    settings = {"total": total or None, "desc": label, "unit": "item", "file": sys.stderr, "dynamic_ncols": True}
    bars = [tqdm(**settings)] if total else []

    def advance(count: int):
        if not bars:
            bars.append(tqdm(**settings))
        bars[0].update(count)

    try:
        yield advance
        for bar in bars:
            bar.n = total or bar.n
    finally:
        for bar in bars:  # also after an error, whose line stands on a line of its own
            bar.close()
