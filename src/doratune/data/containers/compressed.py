"""Compressed files as streams of bytes, decompressed while they are read; a broken archive is one line.

gzip, bzip2 and xz by Python's own modules, zstandard by pyarrow, which comes with `datasets`. Cost: that of the decompression.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ...errors import UserError


def _zstandard(path: Path) -> BinaryIO:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))


COMPRESSIONS = {".gz": gzip.open, ".zst": _zstandard, ".zstd": _zstandard, ".bz2": bz2.open, ".xz": lzma.open}
"""Ending → what opens a file as a stream of what is inside."""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed where its name says that it is compressed.

    Raises:
        UserError: it may not be read, or its archive is broken or another's; also while the block reads.
    """
    opener = COMPRESSIONS.get(path.suffix.lower())
    try:
        with open(path, "rb") if opener is None else opener(path) as stream:
            yield stream
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise UserError(_broken(path, error)) from None
    except OSError as error:
        if opener is not None and error.strerror is None:  # bz2's and pyarrow's errors name no error of the system
            raise UserError(_broken(path, error)) from None
        raise UserError(f"{path} cannot be read ({error.strerror}); give a file that you may read") from None


def _broken(path: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())[:100] or type(error).__name__
    return f"{path} is a broken archive, or none ({reason}); copy or download it again, or give it the ending that it is"
