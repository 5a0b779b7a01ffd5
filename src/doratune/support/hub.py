"""Is a name a hub's, and does the hub answer? Asked once and quickly, before a client that would try again for a minute.

The hub is where `huggingface_hub` looks for it (HF_ENDPOINT). Cost: one request of at most TIMEOUT_S seconds; none offline
(HF_HUB_OFFLINE), where the client itself answers at once from its cache.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from typing import Literal

from ..errors import UserError

TIMEOUT_S = 5


def hub_settings(name: str, kind: Literal["model", "dataset"] = "model") -> dict:
    """Settings of `from_pretrained` for a name that is no local folder: its files in the cache where the hub does not answer.

    Raises:
        UserError: a name that no hub can have; a hub that does not answer, and nothing of that name in the cache.
    """
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    missing = f"{name}: no such {'model folder' if kind == 'model' else 'file'}"
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(f"{missing}, and it can be no hub id; give a folder, or a hub id such as owner/name") from None
    if constants.HF_HUB_OFFLINE or (problem := no_answer(f"{constants.ENDPOINT}/api/{kind}s/{name}")) is None:
        return {}
    try:
        cached = any(repo.repo_id == name and repo.repo_type == kind for repo in scan_cache_dir().repos)
    except CacheNotFound:
        cached = False
    if not cached:
        raise UserError(
            f"{missing}, and the hub at {constants.ENDPOINT} does not answer ({problem}); check the name or the network"
        )
    return {"local_files_only": True}


def no_answer(url: str) -> str | None:
    """Why no server answers there; None where one does, whatever it says of the name."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT_S):
            return None
    except urllib.error.HTTPError as error:
        error.close()
        return None
    except (urllib.error.URLError, OSError, ValueError) as error:
        return str(getattr(error, "reason", error))[:100]
