"""The config that a plan begins with: of a folder, of the hub, a file by itself, or one of the shapes of `doratune bench`.

Weights are not asked for. Source: transformers' AutoConfig. Cost: reading one small file.
"""

from __future__ import annotations

from pathlib import Path

from ..bench.shapes import SHAPES
from ..errors import UserError
from ..support.models import WHEEL_MODEL, model_path, quiet_loading, readable_errors, source_settings


def config_of(name: str, trust_remote_code: bool = False):
    """The config of a model of transformers.

    Raises:
        UserError: there is none, or transformers does not know its architecture.
    """
    from transformers import AutoConfig, LlamaConfig

    if name in SHAPES:
        return LlamaConfig(**SHAPES[name], tie_word_embeddings=False)
    path = Path(name)
    if name.lower() != WHEEL_MODEL and path.exists():
        folder = path if path.is_dir() else path.parent
        if not (folder / "config.json").is_file():
            raise UserError(f"{name} has no config.json; give the folder of a transformers model, or its config.json")
        settings = {"trust_remote_code": trust_remote_code}
    else:
        found = model_path(name)
        folder, settings = found, source_settings(found, trust_remote_code)
    with quiet_loading(), readable_errors(name):
        return AutoConfig.from_pretrained(str(folder), **settings)
