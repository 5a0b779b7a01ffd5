"""A base of which each process of a launch reads its own part alone: transformers' own loading under FSDP2.

    skeleton    the model on the meta device: classes, names and shapes
    blocks      its modules of the classes in `_no_split_modules`, and the embedding, each a group of `fully_shard`, as accelerate
                groups them; an embedding that the head shares lies with the rest
    loading     `from_pretrained(distributed_config=…)`: shards on the meta device, then their slices of the safetensors files

A process holds its own rows of each weight, in pages of the file where dtype and layout are the file's, and what is being read:
at most four tensors' own rows. Cost: the skeleton, once more than the model.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from .devices import device_of

BLOCK = "free_full_weight"
"""transformers' word for a module whose whole weights are let go after its forward."""


def skeleton_of(name: str, trust_remote_code: bool = False) -> nn.Module:
    """The language model `name` without memory.

    Raises:
        UserError: it cannot be found or read, with the reason.
    """
    import transformers

    from .models import auto_class, model_path, quiet_loading, readable_errors, source_settings

    auto, path = auto_class(name, trust_remote_code), model_path(name)
    settings = source_settings(path, trust_remote_code)
    with readable_errors(name), quiet_loading():
        config = transformers.AutoConfig.from_pretrained(path, **settings)
        with torch.device("meta"):
            return auto.from_config(config, trust_remote_code=trust_remote_code)


def blocks_of(skeleton: nn.Module) -> dict[str, str]:
    """Plan of `fully_shard`, as transformers reads one: path of each kind of block, `*` for its number → BLOCK."""
    classes = set(getattr(skeleton, "_no_split_modules", None) or ())
    paths = [name for name, module in skeleton.named_modules() if name and type(module).__name__ in classes]
    if not paths:
        return {}
    owners = Counter(id(p) for _, p in skeleton.named_parameters(remove_duplicate=False))
    embedding = skeleton.get_input_embeddings()
    alone = embedding is not None and all(owners[id(p)] == 1 for p in embedding.parameters())
    paths += [name for name, module in skeleton.named_modules() if alone and module is embedding]
    return {re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path): BLOCK for path in paths}


def obstacle(skeleton: nn.Module, device: str, offload: bool = False) -> str | None:
    """Why each process would have to load all of this model; None: it need not.

    Args:
        device: the recipe's, as `support.devices` reads it; offload: are the parts to stay on the CPU?
    """
    try:
        from transformers.distributed import DistributedConfig

        DistributedConfig(fsdp_size=2, fsdp_plan={})
    except (ImportError, TypeError):
        import transformers

        return f"transformers {transformers.__version__} does not load in shards"
    folder = Path(skeleton.config._name_or_path)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        return "it is stored without safetensors, whose slices could be read; save_pretrained writes them"
    if getattr(skeleton.config, "quantization_config", None):
        return "it is quantized, and packed weights are read whole"
    if not blocks_of(skeleton):
        return f"{type(skeleton).__name__} does not say which of its modules are blocks (_no_split_modules)"
    wanted, here = device_of(device).type, device_of("auto").type
    if wanted != here or (offload and here != "cpu"):
        where = "the parts are to stay on the CPU" if offload else f"device is {device}"
        return f"transformers loads parts onto {here} alone, and {where}"
    return None


def distributed(blocks: dict[str, str]) -> dict:
    """`from_pretrained`'s settings for this process's part of the launch's."""
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(fsdp_size=torch.distributed.get_world_size(), fsdp_plan=blocks)}


def hand_over(model: nn.Module) -> None:
    """Let the Trainer take it as any model that `fully_shard` divided: of what transformers divided itself it writes no optimizer
    state, and a config that names processes is of no use in a file."""
    model._is_distributed_loading_by_transformers = False
    for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values():
        vars(config).pop("distributed_config", None)
