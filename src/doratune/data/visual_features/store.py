"""One safetensors file of features: a row of P places for each sight, in fp16; places that nothing fills are NaN.

    __metadata__    names (JSON, in the order of the rows), fingerprint of the tower, format
    features        (count, P, S)

The size is known before the first feature is: the header is written first and rows behind it, into NAME.partial, which becomes NAME
when it is whole. One that was stopped goes on after its last whole row, if header and so tower, names and sizes are the same. A row
of NaN alone is a sight that could not be read. Cost of reading: the row, from the mapped file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from ...support.durable import one_line_errors, preparing, sync, sync_folder

try:
    import fcntl
except ModuleNotFoundError:  # Windows: nothing is locked
    fcntl = None

FORMAT = "doratune features 1"
LARGEST = float(np.finfo(np.float16).max)


class FeatureFile:
    """A whole file of features, by the sights' names.

    Raises:
        UserError: it is missing, damaged, of another kind, or made by another tower than is wanted.
    """

    def __init__(self, path: Path, fingerprint: str | None = None):
        self.path = path
        header, self._start = _header_of(path)
        facts = header.get("__metadata__", {})
        if facts.get("format") != FORMAT:
            raise UserError(f"{path} holds no features of doratune; give another folder as features")
        if fingerprint is not None and facts.get("fingerprint") != fingerprint:
            raise UserError(f"{path} was made by another image tower or another version of it; remove it, it is made again")
        self.count, self.places, self.size = header["features"]["shape"]
        self.rows = {name: i for i, name in enumerate(json.loads(facts["names"]))}
        whole = self._start + 2 * self.count * self.places * self.size
        if len(self.rows) != self.count or path.stat().st_size != whole:
            raise UserError(f"{path} is damaged: {path.stat().st_size:,} bytes, expected {whole:,}; remove it, it is made again")
        self._mapped: np.memmap | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_mapped": None}  # a process that loads data maps the file for itself

    def __getitem__(self, name: str) -> Tensor:
        """(n, S) in fp32, n ≤ P.

        Raises:
            UserError: nothing could be read of it when the features were made.
        """
        row = torch.from_numpy(np.array(self._map()[self.rows[name]])).float()
        row = row[~row[:, 0].isnan()]
        if not len(row):
            raise UserError(f"nothing could be read of it when {self.path} was made")
        return row

    def holds(self, name: str) -> bool:
        """Has it features? Without reading them."""
        return not np.isnan(self._map()[self.rows[name], 0, 0])

    def _map(self) -> np.memmap:
        if self._mapped is None:
            shape = (self.count, self.places, self.size)
            self._mapped = np.memmap(self.path, np.float16, "r", offset=self._start, shape=shape)
        return self._mapped


def partial_of(path: Path) -> Path:
    """Where a file of features is written."""
    return path.with_name(f"{path.name}.partial")


class FeatureWriter:
    """Writes a file row by row, in the order of its names; as a context, it closes the file and leaves what is there.

    Args:
        going_on: the most rows of an earlier attempt that still count.

    Raises:
        UserError: another process is writing it, or it cannot be written.
    """

    def __init__(self, path: Path, names: Sequence[str], places: int, size: int, fingerprint: str, going_on: int = 0):
        self.path, self.partial = path, partial_of(path)
        self.count, self.places, self.size = len(names), places, size
        head = _head(names, places, size, fingerprint)
        with preparing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.partial, "a+b")  # noqa: SIM115 (closed by __exit__)
        try:
            self._lock()
            self.done = self._begin(head, going_on)
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{self.partial} is being written by another process; wait for it") from None

    def _begin(self, head: bytes, going_on: int) -> int:
        """Rows that are there already and count; what is of another file, or half a row, goes."""
        self._file.seek(0)
        same = self._file.read(len(head)) == head
        rows = (os.fstat(self._file.fileno()).st_size - len(head)) // self._row_bytes if same else 0
        rows = min(rows, going_on, self.count)
        with one_line_errors(self.path):
            self._file.truncate(len(head) + rows * self._row_bytes if same else 0)
            self._file.seek(0, os.SEEK_END)
            if not same:
                self._file.write(head)
        return rows

    @property
    def _row_bytes(self) -> int:
        return 2 * self.places * self.size

    def add(self, features_nS: Tensor | None, name: str) -> None:
        """The next row; None: nothing could be read of it.

        Raises:
            UserError: NaN or infinite features, or the disk is full.
        """
        row = np.full((self.places, self.size), np.nan, np.float16)
        if features_nS is not None:
            values = features_nS.float()
            if not torch.isfinite(values).all() or values.abs().max() > LARGEST:
                raise UserError(f"{name}: the image tower's features are NaN, infinite or beyond fp16; give another tower")
            row[: len(values)] = values.numpy()
        with one_line_errors(self.path):
            self._file.write(row.tobytes())
        self.done += 1

    def finish(self) -> None:
        """Give the whole file its name."""
        with one_line_errors(self.path):
            self._file.flush()
            sync(self.partial)
        with preparing(self.path):
            os.replace(self.partial, self.path)
            sync_folder(self.path.parent)

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(self, *_) -> None:
        with one_line_errors(self.path):
            self._file.close()


def _head(names: Sequence[str], places: int, size: int, fingerprint: str) -> bytes:
    """The beginning of the file, as safetensors defines it."""
    facts = {"fingerprint": fingerprint, "format": FORMAT, "names": json.dumps(list(names), ensure_ascii=False)}
    end = 2 * len(names) * places * size
    tensor = {"dtype": "F16", "shape": [len(names), places, size], "data_offsets": [0, end]}
    text = json.dumps({"__metadata__": facts, "features": tensor}, ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _header_of(path: Path) -> tuple[dict, int]:
    """(header, where the numbers begin)."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 0 < size <= path.stat().st_size - 8:
                raise ValueError
            header = json.loads(file.read(size))
        if header["features"]["dtype"] != "F16" or len(header["features"]["shape"]) != 3:
            raise ValueError
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no file of features, or a damaged one; remove it, it is made again") from None
    return header, 8 + size
