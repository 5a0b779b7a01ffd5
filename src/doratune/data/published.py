"""The published data sets by name: commonsense and arithmetic (§5.1) as LLM-Adapters publishes it, Orca-Math (§6.1) from the hub.

A file enters the cache whole or not at all: it is downloaded beside its final name and checked (length, JSON, number of items,
SHA-256 where it is known) before it is renamed.
"""

from __future__ import annotations

import hashlib
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError, near_misses
from ..support.files import replacing
from ..support.models import cache_folder

PUBLISHED_AT = "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/main/"
TIMEOUT_S = 30


class Published(NamedTuple):
    path: str
    items: int
    sha256: str | None = None


TRAINING_SETS = {"commonsense_170k": Published("ft-training_set/commonsense_170k.json", 170_420)}
TEST_SETS = {
    "boolq": Published("dataset/boolq/test.json", 3_270, "89df2397cbca81dc31adcc6f7f5b635821aa0565aafde46725b2b4bd39b4dfa9"),
    "piqa": Published("dataset/piqa/test.json", 1_838),
    "social_i_qa": Published("dataset/social_i_qa/test.json", 1_954),
    "hellaswag": Published("dataset/hellaswag/test.json", 10_042),
    "winogrande": Published(
        "dataset/winogrande/test.json", 1_267, "6946f5209e7114c65c6d04f8f644c5a061af20d730b1cfe158fff3dc44076fb9"
    ),
    "ARC-Easy": Published("dataset/ARC-Easy/test.json", 2_376, "3f32a84716ca6d57d38728bf80cc8117aecd17445c2cf29a68b571b810eb82dc"),
    "ARC-Challenge": Published(
        "dataset/ARC-Challenge/test.json", 1_172, "4a89ce368ae01a71d268d9851686738b2a0a1d84271116bab49a1dd2b48ecad7"
    ),
    "openbookqa": Published(
        "dataset/openbookqa/test.json", 500, "8479930f7b8a26052c78250280b5465a4016ca7fc806af440d0f37e243f3099e"
    ),
    "AddSub": Published("dataset/AddSub/test.json", 395),
    "MultiArith": Published("dataset/MultiArith/test.json", 600),
    "SingleEq": Published("dataset/SingleEq/test.json", 508),
    "SVAMP": Published("dataset/SVAMP/test.json", 1_000),
    "gsm8k": Published("dataset/gsm8k/test.json", 1_319),
}
ALL = TRAINING_SETS | TEST_SETS


class HubPart(NamedTuple):
    """Items `start` to `stop` of a hub data set in the order of `datasets`' shuffle with `seed`."""

    repository: str
    items: int
    seed: int
    start: int
    stop: int


ORCA_MATH = "microsoft/orca-math-word-problems-200k"
HUB_PARTS = {
    "orca_math_100k": HubPart(ORCA_MATH, 200_035, 42, 0, 100_000),
    "orca_math": HubPart(ORCA_MATH, 200_035, 42, 195_035, 195_535),
}
"""Orca-Math as the published QDoRA runs have it (§6.1, Answer.AI's scripts): the training half, the score's 500 problems."""


def fetch(name: str, base_url: str = PUBLISHED_AT, folder: Path | None = None) -> Path:
    """The local file of a published set, downloaded on first use.

    Args:
        base_url: a mirror with the same paths; folder: the cache, by default the user's.

    Raises:
        UserError: unknown name, no network, or a file that is not what was published.
    """
    if name not in ALL:
        raise UserError(f"unknown data set {name!r}{near_misses(name, ALL)}")
    published = ALL[name]
    target = (folder or cache_folder() / "data") / published.path
    if target.is_file():
        return target
    url = base_url.rstrip("/") + "/" + published.path
    with replacing(target) as temporary:
        download(url, temporary, name, target)
        _check(temporary, published, url)
    return target


def hub_part(name: str) -> list[dict]:
    """The items of one of `HUB_PARTS`: the parts of one data set share no item.

    Raises:
        UserError: the hub cannot be reached, or the data set is not what was published.
    """
    part = HUB_PARTS[name]
    whole = from_hub(part.repository)
    if len(whole) != part.items:
        raise UserError(f"{part.repository} has {len(whole)} items, {part.items} were published; {name} would be other items")
    return whole.shuffle(seed=part.seed).select(range(part.start, part.stop)).to_list()


def from_hub(name: str):
    """The training split of a hub data set.

    Raises:
        UserError: it cannot be loaded, with the reason.
    """
    from datasets import load_dataset

    from ..support.hub import hub_settings

    hub_settings(name, "dataset")
    try:
        return load_dataset(name, split="train")
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot load the data set {name} from the hub: {reason[:200]}") from None


def download(url: str, path: Path, name: str, target: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response, open(path, "wb") as file:
            expected = response.headers.get("Content-Length")
            while block := response.read(1 << 20):
                file.write(block)
    except (urllib.error.URLError, OSError) as error:
        reason = error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
        getattr(error, "close", lambda: None)()
        raise UserError(f"{name} is not in the cache and {url} cannot be fetched ({reason}); put the file at {target}") from None
    if expected is not None and path.stat().st_size != int(expected):
        raise UserError(f"{url} broke off after {path.stat().st_size} of {expected} bytes; nothing was kept, try again")


def _check(path: Path, published: Published, url: str) -> None:
    data = path.read_bytes()
    try:
        items = len(json.loads(data))
    except (ValueError, TypeError):
        raise UserError(f"{url} is not the JSON list that was published; nothing was kept") from None
    if items != published.items:
        raise UserError(f"{url} has {items} items, {published.items} were published; nothing was kept")
    if published.sha256 and hashlib.sha256(data).hexdigest() != published.sha256:
        raise UserError(f"{url} differs from the published file (SHA-256); nothing was kept")
