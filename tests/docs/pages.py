"""The documentation's text: pages, fenced blocks that are marked as runnable, command lines."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNNABLE = re.compile(r"<!-- run -->\n+```(python|bash)\n(.*?)\n```", re.S)


def marks(page: Path) -> int:
    """How many blocks are marked as runnable."""
    return len(re.findall(r"^<!-- run -->$", text_of(page), re.M))


class Block(NamedTuple):
    language: str
    text: str
    line: int


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def runnable(page: Path) -> list[Block]:
    """The blocks behind a line `<!-- run -->`, in order."""
    text = text_of(page)
    return [Block(*match.groups(), text.count("\n", 0, match.start()) + 1) for match in RUNNABLE.finditer(text)]


def commands(page: Path) -> list[tuple[int, str]]:
    """(line, `doratune …`) of every command line in code: fenced, indented or between backquotes; a line that ends in a backslash
    goes on in the next."""
    found, fenced, begun = [], False, ""
    for number, line in enumerate(text_of(page).splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            whole, begun = begun + line.strip(), ""
            if whole.endswith("\\"):
                begun = whole[:-1]
                continue
            found += [(number, one) for one in re.findall(r"(?:^|&& |\$ |-m )(doratune [^|&#>;]*)", whole)]
        else:
            found += [(number, one) for one in re.findall(r"`(doratune [^`|]*)`", line)]
    return found
