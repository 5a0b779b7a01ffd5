"""One base model in memory and adapters by name; all that were used stay loaded, and one of them (or none: `base`) is in use.

The first use of an adapter reads its file: about a second for a model of 135M, and its own A, B and m in memory, no second model.
Using it again moves no numbers. `load_all` reads them all, for batches of several adapters (`doratune.mixed`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..adapter import several
from ..analysis.runs import names as shortest_names
from ..checkpoint.adapter import base_model_of, load, read_folder
from ..checkpoint.quantized import recorded_quantization
from ..errors import UserError, near_misses
from ..support.models import load_model, load_tokenizer

BASE = "base"


def named(entries: Sequence[str]) -> dict[str, str]:
    """{name: folder} of entries `FOLDER` or `NAME=FOLDER`; a folder's name is the shortest end of its path that tells it from
    the others (without `/adapter`, as doratune train calls it).

    Raises:
        UserError: two adapters of one name, a folder named twice, the name `base`.
    """
    pairs = [entry.partition("=")[::2] if "=" in entry and not Path(entry).exists() else ("", entry) for entry in entries]
    runs = [Path(os.path.abspath(folder)) for _, folder in pairs]
    runs = [path.parent if path.name == "adapter" and path.parent.name else path for path in runs]
    if twice := {str(folder) for i, (_, folder) in enumerate(pairs) if runs[i] in runs[:i]}:
        raise UserError(f"adapter names {', '.join(sorted(twice))} twice; name each folder once")
    result: dict[str, str] = {}
    for (name, folder), short in zip(pairs, shortest_names(runs), strict=True):
        name = name or short
        if name == BASE:
            raise UserError(f"{folder}: the name {BASE} is the base model's; give another, as NAME={folder}")
        if name in result:
            raise UserError(f"two adapters are named {name!r}: {result[name]} and {folder}; give names, as NAME=FOLDER")
        result[name] = folder
    return result


class NamedAdapters:
    """The base model with several adapters, one of them in use.

    Args:
        model: hub id, folder or smollm2-135m-instruct; None: the base model that the first adapter records.
        entries: adapters, as `named` takes them.
        quantize: recorded (as the adapters were trained), none, nf4, fp4 or int8.
        trust_remote_code: run the code that the model's folder or repository brings.
        check_base: refuse a base with other row norms than an adapter was trained on, when it is used.
        device: where the model is, as `support.devices` reads it.

    Raises:
        UserError: neither model nor adapters; a folder that is no adapter; adapters of bases that were quantized differently.
    """

    def __init__(
        self,
        model: str | None,
        entries: Sequence[str] = (),
        dtype: str = "float32",
        quantize: str = "recorded",
        trust_remote_code: bool = False,
        check_base: bool = True,
        device: str = "auto",
    ):
        self.folders, self.check_base = named(entries), check_base
        if not model and not self.folders:
            raise UserError("neither model nor adapter is set; give --model M, --adapter FOLDER, or both")
        for folder in self.folders.values():
            read_folder(Path(folder))  # before the base is loaded
        self.base = model or base_model_of(next(iter(self.folders.values())))
        if quantize == "recorded":
            quantize = self._recorded()
        self.tokenizer = load_tokenizer(self.base, trust_remote_code)
        self.model = load_model(self.base, dtype, quantize, trust_remote_code=trust_remote_code, device=device)
        self.current = BASE
        self.inside: dict[str, str] = {}
        """Name → the adapter's name in the model, of those that are loaded."""

    def _recorded(self) -> str | dict:
        recorded = [recorded_quantization(folder) or "none" for folder in self.folders.values()] or ["none"]
        if any(other != recorded[0] for other in recorded):
            raise UserError(
                "these adapters were trained on bases that are quantized differently; give --quantize, or one at a time"
            )
        return recorded[0]

    @property
    def names(self) -> list[str]:
        return [BASE, *self.folders]

    def use(self, name: str):
        """The model with this adapter, or alone (`base`).

        Raises:
            UserError: no such name; an adapter that does not fit the base. The one in use then stays in use.
        """
        if name not in self.names:
            raise UserError(f"no adapter is named {name!r}; there are {', '.join(self.names)}{near_misses(name, self.names)}")
        if name != BASE and name not in self.inside:
            self._load(name)
        else:
            several.use(self.model, self.inside.get(name))
        self.current = name
        return self.model

    def load_all(self):
        """The model with all adapters loaded, the base in use.

        Raises:
            UserError: an adapter that does not fit the base.
        """
        for name in self.folders:
            self.use(name)
        return self.use(BASE)

    def _load(self, name: str) -> None:
        inner = re.sub(r"[^\w.+-]+", "_", name)  # what an adapter may be called in a model
        while inner in self.inside.values():
            inner += "_"
        load(self.model, self.folders[name], name=inner, check_base=self.check_base)
        self.inside[name] = inner
