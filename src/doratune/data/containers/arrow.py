"""Apache Arrow's files: .parquet, and .arrow as `datasets` caches them; by pyarrow, a batch of rows at a time.

Such tables give every row every field of any row, and null where the row has none: nulls are left out, inside messages too. The
line of a row is its number. Cost: one batch of rows in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import UserError
from . import Container

BATCH_ROWS = 1000


def without_nulls(value: Any) -> Any:
    """A row without the fields that are null in it."""
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _rows(batches) -> Iterator[tuple[int, Any]]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield number, without_nulls(row)


def read_parquet(path: Path, stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        source = stream if stream.seekable() else pyarrow.BufferReader(stream.read())
        yield from _rows(parquet.ParquetFile(source).iter_batches(BATCH_ROWS))
    except pyarrow.ArrowException as error:
        raise _damaged(path, error) from None


def read_arrow(path: Path, stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    import pyarrow

    try:
        begin = stream.peek(6)[:6] if hasattr(stream, "peek") else b""
        table = pyarrow.ipc.open_file(stream.read()) if begin == b"ARROW1" else pyarrow.ipc.open_stream(stream)
        batches = (table.get_batch(i) for i in range(table.num_record_batches)) if begin == b"ARROW1" else table
        yield from _rows(batches)
    except pyarrow.ArrowException as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:120]
    return UserError(f"{path} cannot be read as {path.suffix} ({reason}); copy or download it again")


CONTAINERS = (Container((".parquet",), read_parquet), Container((".arrow",), read_arrow))
