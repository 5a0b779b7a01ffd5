"""What commands share: where lines go, the last line in JSON, a progress bar, and memory that the process keeps."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence

from ..support.allocator import keep_freed_memory as keep_freed_memory


def say(line: str) -> None:
    """One line of a report, on standard output at once."""
    print(line, flush=True)


def say_help(parser) -> None:
    """Let --help of an argparse parser fail as any output does: argparse itself is silent about a full disk or a closed pipe."""
    parser.print_help = lambda file=None: print(parser.format_help(), end="", file=file)


def say_next(*commands: Sequence[str]) -> None:
    """The last line of a report: what can be run next, as one would type it."""
    say("next: " + " | ".join(shlex.join(["doratune", *map(str, words)]) for words in commands))


def print_json(value) -> None:
    """The machine-readable result: one document on the last line of standard output."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def progress(label: str, total: int):
    """(advance, close) of a progress bar with items a second, on standard error."""
    from tqdm.auto import tqdm

    bar = tqdm(total=total, desc=label, unit="item", file=sys.stderr, dynamic_ncols=True)

    def close(whole: bool = True):
        bar.n = total if whole else bar.n
        bar.close()

    return bar.update, close
