"""A folder is one generation: whole, the old one or the new one, whenever a process is killed or the power goes.

The new generation is written beside the folder, synced, and takes its name in one act (renameat2, renamex_np). Where a file system
cannot exchange two names, the old folder is set aside for a moment, and `recover` brings it back. A folder that cannot be renamed
(the current folder, a mount point, a parent without write permission) gets its files one by one: its key file, without which nobody
reads it, goes first and comes last. A link to a folder stays a link.

Files that the writer did not make are never lost: they are hard links in the new generation before it takes its place.
`.doratune` in a folder lists what a command wrote there. Cost: the folder's bytes once more while it is written.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from ..errors import UserError
from .durable import TAG, exchange, mode_like, one_line_errors, preparing, remove, remove_leftovers, staged, sync, sync_folder

T = TypeVar("T")

LIST = ".doratune"
_OF_THE_SYSTEM = {".DS_Store", "Thumbs.db", "desktop.ini"}


@contextlib.contextmanager
def generation(path: Path, stays: Callable[[str], bool], key: str | None = None) -> Iterator[Path]:
    """A folder beside `path` that takes its place when the block ends well, and vanishes when it does not.

    Args:
        stays: is this entry of the old folder kept beside what the block writes? (what the block writes wins)
        key: the file without which nobody reads the folder.

    Raises:
        UserError: `path` is no folder, or cannot be written, with the reason. It is then unchanged.
    """
    path = Path(os.path.realpath(path))
    refuse_no_folder(path)
    with preparing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        remove_leftovers(path)
        stage = staged(path if path.is_dir() and not _renamable(path) else path.parent, path.name, folder=True)
        stage_path = stage.__enter__()
    try:
        with _named(stage_path, path), one_line_errors(path):
            yield stage_path
            mode_like(stage_path, path, 0o777)
            sync(stage_path)
        with preparing(path):
            _publish(stage_path, path, stays, key)
    finally:
        stage.__exit__(None, None, None)


@contextlib.contextmanager
def _named(stage: Path, path: Path) -> Iterator[None]:
    """Errors name the folder, not the stage that vanishes."""
    try:
        yield
    except UserError as error:
        if str(stage) not in str(error):
            raise
        raise type(error)(str(error).replace(str(stage), str(path))) from None


@contextlib.contextmanager
def whole_folder(path: Path, key: str | None = None) -> Iterator[Path]:
    """`generation` of a folder that a command writes: what it wrote there before goes, what others put there stays."""
    before = listed_files(path)
    with generation(path, lambda name: name not in before and name not in _OF_THE_SYSTEM, key) as stage:
        yield stage
        write_list(stage, [entry.name for entry in os.scandir(stage)])


@contextlib.contextmanager
def new_folder(path: Path, overwrite: bool = False, key: str | None = None) -> Iterator[Path]:
    """`whole_folder` where nothing was, or where only a command's own files were and `overwrite` is set.

    Raises:
        UserError: see `refuse_existing`.
    """
    refuse_existing(path, overwrite)
    with whole_folder(path, key) as stage:
        yield stage


def refuse_existing(path: Path, overwrite: bool) -> None:
    """A command never writes into a folder that holds something, unless told to, and then only over what a command wrote.

    Raises:
        UserError: what is in the way.
    """
    refuse_no_folder(path)
    names = entries(path)
    if names and not overwrite:
        raise UserError(f"{path} exists and is not empty; give another folder or pass --overwrite")
    if foreign := [name for name in names if name not in listed_files(path)]:
        raise foreign_file(path, foreign[0])


def foreign_file(folder: Path, name: str) -> UserError:
    """What is said where --overwrite would remove what no command wrote."""
    return UserError(
        f"{folder} holds {name}, which no doratune command wrote there; --overwrite replaces only what one wrote: give another "
        "folder, or move it away"
    )


def refuse_no_folder(path: Path) -> None:
    """Raise UserError where `path` cannot be a folder that is written: a file, a device, or below one; without permission."""
    ancestor = Path(os.path.abspath(path))
    while not os.path.lexists(ancestor) and ancestor.parent != ancestor:
        ancestor = ancestor.parent
    if ancestor.is_file():
        raise UserError(f"{path if ancestor == Path(os.path.abspath(path)) else ancestor} is a file; give the name of a folder")
    if ancestor.exists() and not ancestor.is_dir():
        raise UserError(f"{ancestor} is a device; give the name of a folder")
    if ancestor.is_dir() and not os.access(ancestor, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written (no permission to write into {ancestor}); give another folder")


def entries(path: Path) -> list[str]:
    """What lies in a folder, in order, without what the system or a write leaves there; nothing where there is no folder."""
    if not path.is_dir():
        return []
    return sorted(name for name in os.listdir(path) if name not in {*_OF_THE_SYSTEM, LIST} and TAG not in name)


def listed_files(path: Path) -> set[str]:
    """The names that commands wrote into a folder, by its own list."""
    try:
        names = json.loads((path / LIST).read_text(encoding="utf-8"))["files"]
        return {str(name) for name in names} | {LIST}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def write_list(folder: Path, names) -> None:
    """Record which names in a folder are a command's own."""
    (folder / LIST).write_text(json.dumps({"files": sorted({*names} - {LIST})}) + "\n", encoding="utf-8")


def recover(path: Path) -> None:
    """Bring back a folder that was set aside by a process that was killed before it could put the new one in its place."""
    aside = _aside(path)
    if not os.path.lexists(path) and aside.is_dir():
        with contextlib.suppress(OSError):  # another process did it
            os.rename(aside, path)


def steady(folder: Path, read: Callable[[], T]) -> T:
    """What `read` says about a folder, read again where the folder was replaced meanwhile."""
    for _ in range(20):
        before = _identity(folder)
        try:
            value = read()
        except UserError:
            if _identity(folder) == before:
                raise
            continue
        if _identity(folder) == before:
            return value
    return read()


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _aside(path: Path) -> Path:
    return path.parent / f".{path.name}.before"


def _renamable(path: Path) -> bool:
    """Can the folder take another name? Not a mount point, not below us, and the parent takes new names."""
    try:
        here = Path(os.path.realpath(os.getcwd()))
    except OSError:  # the current folder was removed
        here = Path("/")
    below_us = path == here or path in here.parents
    return not below_us and not os.path.ismount(path) and os.access(path.parent, os.W_OK | os.X_OK)


def _publish(stage: Path, path: Path, stays: Callable[[str], bool], key: str | None) -> None:
    names = os.listdir(stage)
    if stage.parent == path or not _take_place(stage, path, stays):
        _move_in(stage, path, names, stays, key)
    sync_folder(path.parent)


def _take_place(stage: Path, path: Path, stays: Callable[[str], bool]) -> bool:
    """Let the stage be `path`, whole; False where the file system does not."""
    if not os.path.lexists(path):
        os.rename(stage, path)
        return True
    try:
        for name in os.listdir(path):
            if stays(name) and TAG not in name and not os.path.lexists(stage / name):
                _link(path / name, stage / name)
        sync_folder(stage)
        if not exchange(stage, path):
            remove(_aside(path))
            os.rename(path, _aside(path))
            os.rename(stage, path)
            os.rename(_aside(path), stage)
    except OSError:
        recover(path)
        return False
    for name in os.listdir(stage):  # what came into the old folder while it was linked
        if stays(name) and TAG not in name and not os.path.lexists(path / name):
            os.rename(stage / name, path / name)
    return True


def _link(source: Path, target: Path) -> None:
    """A file, or a folder's files, under a second name."""
    if source.is_dir() and not source.is_symlink():
        target.mkdir()
        for entry in os.scandir(source):
            _link(Path(entry.path), target / entry.name)
        mode_like(target, source, 0o777)
    else:
        os.link(source, target, follow_symlinks=False)


def _move_in(stage: Path, path: Path, names: list[str], stays: Callable[[str], bool], key: str | None) -> None:
    """File by file; the key file goes first and comes last."""
    if key is not None:
        (path / key).unlink(missing_ok=True)
        sync_folder(path)
    for name in os.listdir(path):
        if name not in names and not stays(name) and TAG not in name:
            remove(path / name)
    for name in sorted(names, key=lambda name: name == key):
        if (path / name).is_dir():
            remove(path / name)
        os.replace(stage / name, path / name)
    sync_folder(path)
