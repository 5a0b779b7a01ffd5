"""Tables as text: columns aligned for a terminal, Markdown, and Markdown in its place between the markers of a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], rule: bool = True) -> list[str]:
    """Lines with columns two spaces apart, a rule below the head."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]
    return [lines[0], "-" * len(lines[0]), *lines[1:]] if rule else lines


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def placed(page: Path, name: str, content: str, text: str | None = None) -> str:
    """The page's text (or `text`, what it is to become) with `content` between `<!-- name -->` and `<!-- /name -->`.

    Raises:
        UserError: the page lacks the markers.
    """
    text = page.read_text(encoding="utf-8") if text is None else text
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, opening, rest = text.partition(start)
    _, closing, after = rest.partition(end)
    if not opening or not closing:
        raise UserError(f"{page.name} lacks the markers; put {start} and {end}, in this order, where its table belongs")
    return f"{before}{start}\n{content}\n{end}{after}"
