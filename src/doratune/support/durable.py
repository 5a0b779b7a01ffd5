"""What whole-or-absent files and folders stand on: staging names with a lock, syncing, an exchange of two folders in one act, and
what a full disk is called by each library.

A staging name is `.NAME.doratune-XXXXXXXX`, locked (flock) as long as its process lives: one that nobody locks was left by a
process that was killed, and the next write into the same folder removes it. Cost of syncing: one fsync a file and folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from ..errors import UserError

try:
    import fcntl
except ModuleNotFoundError:  # Windows: nothing is locked, and no leftover is taken for one
    fcntl = None

TAG = ".doratune-"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
_AT_FDCWD = -100


@contextlib.contextmanager
def staged(home: Path, name: str, folder: bool) -> Iterator[Path]:
    """A locked, empty file or folder in `home` that belongs to `name`; what is left at its name goes when the block ends."""
    remove_leftovers(home)
    path, descriptor = _locked_name(home, f".{name[:60]}{TAG}", folder)
    try:
        yield path
    finally:
        remove(path)
        os.close(descriptor)


def _locked_name(home: Path, prefix: str, folder: bool) -> tuple[Path, int]:
    while True:
        if folder:
            path = Path(tempfile.mkdtemp(dir=home, prefix=prefix))
            descriptor = _open(path)
        else:
            descriptor, name = tempfile.mkstemp(dir=home, prefix=prefix)
            path = Path(name)
        with contextlib.suppress(OSError):  # a file system without locks
            if fcntl and descriptor >= 0:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        if path.exists():  # else another process took it for a leftover before it was locked
            return path, descriptor
        os.close(descriptor)


def _open(folder: Path) -> int:
    try:
        return os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return os.open(os.devnull, os.O_RDONLY)


def remove_leftovers(home: Path) -> None:
    """Remove the staging names in `home` whose process has ended."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError):
        for path in [Path(entry.path) for entry in os.scandir(home) if entry.name.startswith(".") and TAG in entry.name]:
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    remove(path)
                finally:
                    os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Bring a file, or all of a folder, onto the disk.

    Raises:
        OSError: the disk is full, or refuses.
    """
    if path.is_dir():
        for folder, _, files in os.walk(path):
            for name in files:
                _sync_one(Path(folder) / name)
            sync_folder(Path(folder))
    else:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    if path.is_symlink() or not path.is_file():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Bring a folder's names onto the disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def exchange(one: Path, other: Path) -> bool:
    """Give two existing paths each other's name in one act; False where the system or the file system cannot.

    Raises:
        OSError: it can, but not with these two.
    """
    try:
        library = ctypes.CDLL(None, use_errno=True)
        call = library.renamex_np if sys.platform == "darwin" else library.renameat2
    except (OSError, AttributeError, TypeError):
        return False
    a, b = os.fsencode(one), os.fsencode(other)
    arguments = (a, b, _EXCHANGE) if sys.platform == "darwin" else (_AT_FDCWD, a, _AT_FDCWD, b, _EXCHANGE)
    if call(*arguments) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))


@contextlib.contextmanager
def one_line_errors(path: Path) -> Iterator[None]:
    """A full disk or a folder that takes no file, met while `path` is written, as one line.

    Raises:
        UserError: what is in the way.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if (reason := write_problem(error)) is None:
            raise
        raise UserError(f"{path} cannot be written ({reason}); nothing of it was changed") from None


def write_problem(error: BaseException) -> str | None:
    """Why a write failed, for errors that mean the disk and not a defect; None for others."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return _advice(error.errno)
    if isinstance(error, SafetensorError) and (number := re.search(r"os error (\d+)", str(error))):
        return _advice(int(number[1]))
    if isinstance(error, RuntimeError) and ("PytorchStreamWriter" in str(error) or "inline_container" in str(error)):
        return "the disk is full or took no more; free some space and run again"
    return None


def _advice(number: int) -> str:
    more = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some space", errno.EFBIG: "raise the limit on file sizes"}
    return f"{os.strerror(number)}; {more[number]} and run again" if number in more else os.strerror(number)


@contextlib.contextmanager
def preparing(path: Path) -> Iterator[None]:
    """As `one_line_errors`, around our own steps only: every error of the system is about writing `path`."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        reason = f"{where} is a file" if isinstance(error, FileExistsError) else f"{error.strerror}: {where}"
        raise UserError(f"{path} cannot be written ({reason}); give another place") from None


def mode_like(path: Path, model: Path, default: int) -> None:
    """Give `path` the permissions and the owner of what it replaces, or what the umask leaves of `default`."""
    try:
        before = os.stat(model)
    except OSError:
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(path, default & ~mask)
        return
    os.chmod(path, before.st_mode & 0o7777)
    if hasattr(os, "chown") and (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
        with contextlib.suppress(OSError):
            os.chown(path, before.st_uid, before.st_gid)
