"""A folder as a repository of a model hub, by huggingface_hub: private unless asked otherwise, one commit.

What goes up is chosen, not whatever lies in the folder: weights, configs, tokenizer, card. Pickled files, optimizer states and
hidden files stay. Cost: the bytes of the files, said before; a dry run asks nobody.
"""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError, listed
from ..support.absent import no_folder
from ..support.files import read_json
from ..support.hub import no_answer
from ..support.pipelines import ADAPTER_RECORD, INDEX

KEPT_HERE = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.pkl",
    "*.ckpt",
    "optimizer*",
    "scheduler.*",
    "rng_state*",
    "trainer_state.json",
    "training_args*",
)
"""What is never sent: pickled files and the state of a training."""


class Parcel(NamedTuple):
    """What would be sent, and what stays."""

    folder: Path
    sent: dict[str, int]
    """name relative to the folder: bytes"""
    left: list[str]

    @property
    def total_bytes(self) -> int:
        return sum(self.sent.values())


def parcel(folder: str | Path) -> Parcel:
    """Look at a folder that is to be pushed.

    Raises:
        UserError: no adapter or model folder, an adapter whose tensors are missing, a base model that only this machine has.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: {no_folder(folder)}; give an adapter or model folder")
    if not any((folder / name).is_file() for name in ("adapter_config.json", "config.json", INDEX, ADAPTER_RECORD)):
        inner = [name for name in ("adapter", "model") if (folder / name).is_dir()]
        hint = f"; did you mean {folder / inner[0]}?" if inner else ""
        raise UserError(f"{folder} holds neither adapter_config.json nor config.json: no adapter or model{hint}")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {str(path.relative_to(folder)): path for path in files}
    left = [name for name in names if _stays(name)]
    sent = {name: path.stat().st_size for name, path in names.items() if name not in left}
    if not any(name.endswith((".safetensors", ".gguf")) for name in sent):
        raise UserError(f"{folder} holds no .safetensors file to send; merge or save it again")
    _refuse_local_base(folder)
    return Parcel(folder, sent, left)


def _stays(name: str) -> bool:
    parts = Path(name).parts
    return any(part.startswith(".") for part in parts) or any(fnmatch.fnmatchcase(parts[-1], pattern) for pattern in KEPT_HERE)


def _refuse_local_base(folder: Path) -> None:
    """An adapter over a folder of this machine is of no use elsewhere."""
    for name, key in (("adapter_config.json", "base_model_name_or_path"), (ADAPTER_RECORD, "model")):
        base = read_json(folder / name, "an adapter folder needs it").get(key) if (folder / name).is_file() else None
        if base and (os.path.isabs(base) or Path(base).exists()):
            raise UserError(
                f"the adapter's base model is {base!r}, a path of this machine that nobody else can load; write the base's hub id "
                f"into {folder / name} ({key}), or merge and push the model"
            )


def push(folder: str | Path, to: str, private: bool = True, message: str | None = None, revision: str | None = None) -> str:
    """Create the repository `to` (owner/name) where there is none, and commit the folder's files to it; the commit's address.

    Raises:
        UserError: see `parcel`; a name that no hub can have; no token; the hub does not answer or refuses, in its words.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    content = parcel(folder)
    try:
        validate_repo_id(to)
    except HFValidationError:
        raise UserError(f"to is {to!r}, which no hub takes; give owner/name") from None
    api = HfApi()
    if problem := no_answer(api.endpoint):
        raise UserError(f"the hub at {api.endpoint} does not answer ({problem}); nothing was sent, try again")
    try:
        api.create_repo(to, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=to,
            folder_path=content.folder,
            allow_patterns=list(content.sent),
            commit_message=message or f"{content.folder.name}, by doratune",
            revision=revision,
        )
    except LocalTokenNotFoundError:
        raise UserError("no token of the hub is here; run: hf auth login, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        raise UserError(f"the hub at {api.endpoint} refused {to}: {_words(error)}") from None
    except OSError as error:
        raise UserError(f"the hub at {api.endpoint} does not answer ({_words(error)}); nothing was committed, try again") from None
    return str(commit.commit_url)


def _words(error: Exception) -> str:
    said = getattr(error, "server_message", None) or str(error)
    status = getattr(getattr(error, "response", None), "status_code", None)
    hint = "; check the token: hf auth login, or HF_TOKEN" if status in (401, 403) else ""
    return f"{' '.join(str(said).split())[:200]}{hint}"


def described(content: Parcel) -> list[str]:
    """Lines about what is sent."""
    lines = [f"  {size / 2**20:10.2f} MiB  {name}" for name, size in content.sent.items()]
    lines.append(f"  {content.total_bytes / 2**20:10.2f} MiB  in {len(content.sent)} files")
    return lines + ([f"stays here: {listed(content.left, 5)}"] if content.left else [])
