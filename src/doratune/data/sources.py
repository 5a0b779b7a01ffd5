"""Where examples come from: a file, a folder of files, a data set that `datasets` saved, a published name, a hub id.

    file.jsonl[:100]              the first 100 items
    folder                        its data files in the order of their names; the training part where the names say which
    owner/name:split              of the hub, `train` where none is said; owner/name#config:split where it has configurations

Every item is an `Item` with its place. Cost: the files'; the hub's by `datasets`, from its cache or streamed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError, listed
from . import facts, published
from .containers import container_of, known_ending, suffixes
from .containers.arrow import without_nulls
from .files import Item, each_example

DEMO = "demo"
"""The items of `facts`: they come with the package."""

_PARTS = ("test", "valid", "val", "dev", "eval")
_SAVED = ("dataset_dict.json", "state.json")


def each_item(source: str, mirror: str | None = None, unusable: list[str] | None = None, streaming: bool = False) -> Iterator[Item]:
    """The items of one source, one after the other.

    Args:
        mirror: base address of a mirror of the published sets.
        unusable: takes a line for each item that is no object; None: the first stops.
        streaming: read the hub's data set piece by piece; refuse a file that must be held whole.

    Raises:
        UserError: nothing of that name, a malformed file.
    """
    name, first = (m[1], int(m[2])) if (m := re.fullmatch(r"(.+)\[:(\d+)\]", source)) else (source, None)
    items = _items(name, mirror, unusable, streaming)
    return items if first is None else itertools.islice(items, first)


def _items(name: str, mirror: str | None, unusable: list[str] | None, streaming: bool) -> Iterator[Item]:
    path = Path(name)
    local, _, split = name.rpartition(":")
    if name == DEMO:
        return (Item(item, f"{DEMO}: item {n}", n, DEMO) for n, item in enumerate(facts.items("train"), 1))
    if name in published.HUB_PARTS:
        return _numbered(published.hub_part(name), name)
    if name in published.ALL:
        return each_example(published.fetch(name, **({"base_url": mirror} if mirror else {})), unusable)
    if path.is_dir() or (local and Path(local).is_dir()):
        folder = path if path.is_dir() else Path(local)
        return _of_folder(folder, "" if path.is_dir() else split, unusable, streaming)
    if container_of(path) is not None or path.exists():
        return _of_file(path, unusable, streaming)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(#[\w.-]+)?(:[\w.+%:\[\]-]+)?", name):
        return _of_hub(name, streaming)
    known = listed([DEMO, *published.ALL, *published.HUB_PARTS], 20)
    raise UserError(
        f"data is {name!r}: no such file or known set; give a file ({', '.join(suffixes())}), a folder, a hub id, or {known}"
    )


def _of_file(path: Path, unusable: list[str] | None, streaming: bool) -> Iterator[Item]:
    container = container_of(path)
    if container is None and path.suffix not in ("", ".txt", ".json"):
        raise UserError(f"{path} has the ending {path.suffix}, which is no data file's; {known_ending(path)}")
    if streaming and (container is None or not container.piecewise):
        raise UserError(f"{path} is read whole, which streaming is there to avoid; write it as .jsonl, or drop streaming")
    return each_example(path, unusable)


def files_of(folder: Path) -> list[Path]:
    """The data files of a folder in the order of their names; those of training alone where the names say which are."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and container_of(path) and not path.name.startswith("."))
    if any((folder / name).is_file() for name in ("adapter_config.json", "config.json", "model_index.json")):
        raise UserError(f"{folder} is the folder of a model or an adapter; give a data file, or a folder of them")
    if not files:
        raise UserError(f"{folder} is a folder without data files; expected files that end in {', '.join(suffixes())}")
    training = [path for path in files if path.name.lower().startswith("train")]
    other = [path for path in files if path.name.lower().startswith(_PARTS)]
    return training if training and other else files


def _of_folder(folder: Path, split: str, unusable: list[str] | None, streaming: bool) -> Iterator[Item]:
    if any((folder / name).is_file() for name in _SAVED):
        return _saved(folder, split)
    if split:
        raise UserError(
            f"{folder}:{split}: a split is for a data set that `datasets` saved or the hub has; give a file of {folder}"
        )
    return itertools.chain.from_iterable(_of_file(path, unusable, streaming) for path in files_of(folder))


def _saved(folder: Path, split: str) -> Iterator[Item]:
    """A data set that `save_to_disk` wrote; its table stays on the disk."""
    from datasets import DatasetDict, load_from_disk

    try:
        whole = load_from_disk(str(folder))
    except Exception as error:  # whatever pyarrow, fsspec and json raise
        raise UserError(f"{folder} cannot be read as a data set of `datasets` ({_reason(error)}); save it again") from None
    if isinstance(whole, DatasetDict):
        if (split or "train") not in whole:
            raise UserError(f"{folder} has no split {split or 'train'!r}; it has {', '.join(whole)}: give {folder}:SPLIT")
        whole = whole[split or "train"]
    elif split:
        raise UserError(f"{folder}:{split}: this data set has no splits; give {folder}")
    return _numbered(whole, str(folder))


def _of_hub(name: str, streaming: bool) -> Iterator[Item]:
    from datasets import load_dataset

    from ..support.hub import hub_settings

    repository, _, split = name.partition(":")
    repository, _, config = repository.partition("#")
    hub_settings(repository, "dataset")
    try:
        whole = load_dataset(repository, config or None, split=split or "train", streaming=streaming)
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise UserError(f"cannot load the data set {name} from the hub: {_reason(error)}") from None
    return _numbered(whole, name)


def _numbered(rows, name: str) -> Iterator[Item]:
    return (Item(without_nulls(row), f"{name}: item {n}", n, name) for n, row in enumerate(rows, 1))


def _reason(error: Exception) -> str:
    return (str(error).splitlines()[0] if str(error) else type(error).__name__)[:200]
