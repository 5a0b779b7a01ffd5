"""What a table of the page is: words, numbers, or a figure with its interval; and how they are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NONE = "–"


@dataclass(frozen=True)
class TableCell:
    """A figure: what stands in bold, beside that, small below it, and shares (0 to 1) to draw as an interval.

    Args:
        interval: (low, figure, high); mark: a share to compare with, drawn as a tick.
    """

    text: str
    beside: str = ""
    below: str = ""
    interval: tuple[float, float, float] | None = None
    mark: float | None = None


@dataclass(frozen=True)
class Table:
    """The first column names the row. A number in a cell is shown with four digits, None as a dash."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[TableCell | str | int | float | None]]
    note: str = ""

    def numeric(self) -> list[bool]:
        """Which columns hold figures, and stand to the right."""
        columns = [[row[i] for row in self.rows if i < len(row)] for i in range(len(self.columns))]
        return [i > 0 and all(_is_figure(cell) for cell in cells) for i, cells in enumerate(columns)]

    @classmethod
    def from_dict(cls, value: Mapping) -> Table:
        """A table as a JSON file holds it: title, columns, rows, note; what does not fit its columns is left out."""
        columns, rows = (part if isinstance(part := value.get(key), list) else [] for key in ("columns", "rows"))
        cells = [[c if isinstance(c, str | int | float) else shown(c) for c in row] for row in rows if isinstance(row, list)]
        title, note = (str(value.get(key) or "") for key in ("title", "note"))
        return cls(title, [str(c) for c in columns], [row[: len(columns)] for row in cells], note)


def _is_figure(cell) -> bool:
    words = cell.text if isinstance(cell, TableCell) else shown(cell)
    return words == NONE or words[:1].isdigit() or (words[:1] in "+-−" and words[1:2].isdigit())


def shown(value) -> str:
    """A setting or figure in words: `70,000`, `0.0012`, `q_proj, v_proj`, a dash for nothing."""
    if value is None or (isinstance(value, str | list | tuple | dict) and not value):
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(shown(v) for v in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {shown(v)}" for k, v in value.items())
    return str(value)


def percent(share: float | None, digits: int = 1) -> str:
    return NONE if share is None else f"{100 * share:.{digits}f} %"


def size(count: float | None) -> str:
    """Bytes as MiB or GiB."""
    if count is None:
        return NONE
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
