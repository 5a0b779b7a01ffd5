"""Tables of text: .csv (commas) and .tsv (tabs) with the names of the fields in the first line, by Python's csv module.

A cell may hold line feeds between quotation marks. Every value is text; lists in JSON text are read where a format needs a list.
Cost: one pass, row by row.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import UserError
from . import LINE_BYTES, Container


def _reader(delimiter: str):
    def read(path: Path, stream: BinaryIO) -> Iterator[tuple[int, Any]]:
        csv.field_size_limit(max(csv.field_size_limit(), LINE_BYTES))
        with io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
            rows = csv.reader(text, delimiter=delimiter, strict=True)
            try:
                yield from _rows(path, rows, delimiter)
            except csv.Error as error:
                raise UserError(f"{path}, line {rows.line_num}: malformed table ({error}); put quotes around such a cell") from None
            except UnicodeDecodeError:
                raise UserError(f"{path} is not UTF-8 text (after line {rows.line_num}); save it as UTF-8") from None

    return read


def _rows(path: Path, rows, delimiter: str) -> Iterator[tuple[int, Any]]:
    header = next(rows, [])
    _check_header(path, header, delimiter)
    before = rows.line_num
    for row in rows:
        line, before = before + 1, rows.line_num
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(header):
            problem = f"has {len(row)} cells, its header {len(header)}; quote cells that hold a separator"
            yield line, UserError(f"{path}, line {line} {problem}")
            continue
        yield line, dict(zip(header, row, strict=True))


def _check_header(path: Path, header: list[str], delimiter: str) -> None:
    if not any(name.strip() for name in header):
        raise UserError(f"{path} is empty; expected a line with the names of the fields, then a row a line")
    if twice := [name for name in header if header.count(name) > 1]:
        raise UserError(f"{path}, line 1 names the field {twice[0]!r} twice; give each a name of its own")
    other = next((mark for mark in (";", "\t", "|", ",") if mark != delimiter and len(header) == 1 and mark in header[0]), None)
    if other is not None:
        raise UserError(f"{path}, line 1 is one field, {header[0]!r}; separate fields by {delimiter!r}, not by {other!r}")


CONTAINERS = (Container((".csv",), _reader(",")), Container((".tsv",), _reader("\t")))
