"""Merge an adapter into a model folder, shard by shard: base + adapter → an ordinary folder of transformers or diffusers.

Each weight is read, merged in row tiles of fp32 by the same code as in memory, cast and put into its shard; memory stays near one
copy of the largest shard. The model itself is built on the meta device only, to learn names, shapes and layer kinds.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapter.layer import Common, adapt, take_off
from ..adapter.merge import checked_norm, merged_tiles
from ..adapter.targets import Selection
from ..config import AdapterConfig
from ..directions import all_shared
from ..errors import UserError, listed
from ..formats import recognized
from ..layers import kind_of
from ..layers.layouts import layer_at
from ..layers.registry import Registry
from ..publishing.card import CARD, write_merged_card
from ..support.allocator import blocks_apart
from ..support.files import open_tensors, read_json, shard_files, write_json, write_tensors
from ..support.folders import new_folder
from ..support.headers import Keys
from ..support.model_folders import TrainedClass, changed_config, folder_config, is_diffusers, meta_model, wanted, weights_name
from ..support.models import model_path, readable_errors, torch_dtype
from ..support.transformers4 import readable_by_both
from .adapter import CONFIG, OWN, read_folder
from .base_check import refuse_other_checkpoint
from .fitting import fit, put_layer
from .ties import keep_ties, like_of, tied_to

_LEFT_BEHIND = {"adapter_config.json", "doratune.json", CARD}  # the base's card is about the base


@dataclass
class Plan:
    """An adapter resolved against a base checkpoint, before anything is written."""

    skeleton: nn.Module
    config: AdapterConfig
    selection: Selection
    tensors: dict[tuple[str, str], Tensor]
    common: Common
    merged: dict[str, str]  # key in the checkpoint → adapted module
    replaced: dict[str, Tensor]  # key in the checkpoint → tensor of a module that was trained whole
    untied: dict[str, str]  # a weight that was tied to one of those → the key of their common tensor in the checkpoint
    like: dict[str, str]  # a trained parameter that the checkpoint lacks → a key in it that has the dtype of the base's
    apart: dict[str, tuple[str, str]]  # an adapted weight that is stored under a tied one's key → (its module, that key)
    base: dict[str, Tensor]  # key in the checkpoint → base weight that came with the adapter
    new: set[str]  # trained parameters that the checkpoint lacks and that are tied to nothing in it: a new head
    names: dict[str, str]  # key in the checkpoint → name in the model

    def name_in_result(self, key: str) -> str:
        """A key of the checkpoint as the result has it: with the base model's prefix, once a head stands beside it."""
        prefix = f"{getattr(self.skeleton, 'base_model_prefix', '')}."
        lacks = self.new and self.names.get(key, "").startswith(prefix) and not key.startswith(prefix)
        return prefix + key if lacks else key


@blocks_apart()
def merge_checkpoint(
    base: str,
    adapter: str | Path,
    output: str | Path,
    dtype: str | None = None,
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
    check_base: bool = True,
) -> Path:
    """Write the merged model to `output`, whole or not at all.

    Args:
        base: local folder, hub id or smollm2-135m-instruct; dtype: of the result, None keeps each tensor's own.
        check: looks at the merged folder before it takes the place of `output`; what it raises leaves `output` as it was.
        check_base: refuse a base with other row norms than the adapter was trained on.

    Raises:
        UserError: no safetensors, an adapter that does not fit or is another base's, an output folder that exists.
    """
    folder, output = base_folder(base), Path(output)
    out_dtype = torch_dtype(dtype) if dtype else None
    shards = list_shards(folder)
    plan = make_plan(folder, Path(adapter), {key for keys in shards.values() for key in keys})
    if check_base:
        refuse_other_checkpoint(plan, lambda key: _read(folder, shards, key), adapter)
    extra = {k: t for k, t in plan.replaced.items() if not any(k in keys for keys in shards.values())}
    dtypes = {k: _read(folder, shards, plan.like[k]).dtype for k in extra if k in plan.like}  # what is trained whole is fp32
    extra |= {peer: _read(folder, shards, key) for peer, key in plan.untied.items()}
    apart = {path: (name, _read(folder, shards, key)) for path, (name, key) in plan.apart.items()}
    untied = bool(extra.keys() - plan.new or apart)
    weight_map, size = {}, 0
    with new_folder(output, overwrite, key="config.json") as temporary:
        for number, (shard, keys) in enumerate(shards.items()):
            whole = dict(merged_shard(folder / shard, keys, plan, out_dtype))
            if number == len(shards) - 1:
                whole |= {k: _cast(t, out_dtype or dtypes.get(k, t.dtype)) for k, t in extra.items()}
                for path, (name, weight) in apart.items():
                    weight = plan.base.get(path, weight).to(weight.dtype)
                    whole[path] = _cast(merged_weight(plan, name, weight, out_dtype or weight.dtype), out_dtype or weight.dtype)
            whole = {plan.name_in_result(key): t for key, t in whole.items()}
            write_tensors(temporary / shard, whole)
            weight_map |= {key: shard for key in whole}
            size += sum(t.nbytes for t in whole.values())
            del whole
        if len(shards) > 1:
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(temporary / f"{weights_name(folder_config(folder))}.index.json", index)
        copy_rest(folder, temporary, out_dtype, untied, changed_config(folder, plan.skeleton, bool(plan.new)))
        write_merged_card(temporary, base, adapter, plan.config.method, folder, output.name)
        if check is not None:
            check(temporary)
    return output


def wanted_of(adapter: Path) -> TrainedClass:
    """The class that an adapter folder was trained on, as far as it says so."""
    own = read_json(adapter / OWN, "it belongs to the adapter folder") if (adapter / OWN).is_file() else {}
    return wanted(read_json(adapter / CONFIG, "an adapter folder needs it"), own)


def trained_shapes(tensors: dict[tuple[str, str], Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of what an adapter folder holds whole."""
    return {key: tuple(t.shape) for (name, key), t in tensors.items() if not name}


def stored_dtype(folder: Path) -> str:
    """The dtype of a model folder: what its config says, else that of its largest tensor."""
    config = folder_config(folder)
    said = config.get("dtype") or config.get("torch_dtype")
    if isinstance(said, str):
        return said
    file, keys = next(iter(list_shards(folder).items()))
    with open_tensors(folder / file) as tensors:
        sizes = {key: torch.Size(tensors.get_slice(key).get_shape()).numel() for key in keys}
        return str(tensors.get_tensor(max(sizes, key=sizes.get)).dtype).removeprefix("torch.")


def base_folder(base: str) -> Path:
    """The local folder of a base model, from the hub's cache if need be."""
    path = Path(model_path(base))
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    with readable_errors(base):
        return Path(snapshot_download(str(base), ignore_patterns=["*.bin", "*.gguf", "*.pt", "*.h5", "*.msgpack"]))


def list_shards(folder: Path) -> dict[str, list[str]]:
    """File → its tensor names, for one file or an index."""
    config = folder_config(folder)
    single = weights_name(config)
    index = f"{single}.index.json"
    if config.get("quantization_config"):
        raise UserError(f"{folder} is quantized; merge into the unquantized base model")
    files = sorted(set(shard_files(folder / index).values())) if (folder / index).is_file() else [single]
    if missing := [file for file in files if (folder / index).is_file() and not (folder / file).is_file()]:
        raise UserError(f"{folder} lacks {listed(missing)}, which {index} names; copy or download the model again")
    if not files or not (folder / files[0]).is_file():
        raise UserError(f"{folder} has no {single} or {index}; save the base model as safetensors first")
    shards = {}
    for file in files:
        with open_tensors(folder / file) as tensors:
            shards[file] = list(tensors.keys())
    return shards


def make_plan(folder: Path, adapter: Path, keys: set[str]) -> Plan:
    """Resolve the adapter against the checkpoint's names; every problem is found here."""
    foreign = recognized(adapter) is not None
    config, raw, tensors = read_folder(adapter, meta_model(folder) if foreign else None)
    skeleton = meta_model(folder, None if foreign else wanted_of(adapter), trained_shapes(tensors))
    read = fit(skeleton, adapter, config, raw, tensors)
    config, selection, tensors = read.config, read.selection, read.tensors
    files = Keys(skeleton, keys)
    merged, apart, missing = {}, {}, []
    parameters = {path for path, _ in skeleton.named_parameters(remove_duplicate=False)}
    paths = {name: f"{name}.{kind_of(layer_at(skeleton, name)).weight_name}" for name in selection.ranks}
    for name, path in paths.items():
        if key := files.find(path):
            merged[key] = name
        elif path in parameters and (key := like_of(path, skeleton, files)):
            apart[path] = name, key
        else:
            missing.append(name)
    if missing:
        raise UserError(
            f"{folder} names its tensors otherwise: no weight found for {listed(missing)}; load the model, "
            "doratune.load the adapter, doratune.merge and save_pretrained instead"
        )
    whole = {key: t for (name, key), t in tensors.items() if not name and key not in all_shared()}
    replaced = {files.find(key) or key: t for key, t in whole.items()}
    changed = {*whole, *paths.values()}
    untied = {peer: key for key, peers in tied_to(skeleton, changed).items() for peer in peers if not files.find(peer)}
    untied = {peer: own for peer, key in untied.items() if (own := files.find(key))}
    base = {files.find(path) or path: t for path, t in read.base.items()}
    for path in base.keys() - keys - apart.keys():  # of a tied weight that the checkpoint has under another key
        if not torch.equal(base[path], base.get(like_of(path, skeleton, files), torch.empty(0))):
            replaced[path] = base[path]
    keep_ties(skeleton, replaced, keys)
    lacking = [path for path in parameters if path in replaced and path not in keys]
    stored = next(iter((*merged, *(key for _, key in apart.values()))))
    like = {key: like_of(key, skeleton, files) or stored for key in lacking}
    new = {key for key in lacking if like_of(key, skeleton, files) is None}
    names = {key: name for name in skeleton.state_dict() if (key := files.find(name))}
    modules = [layer_at(skeleton, name) for name in selection.ranks]
    common = Common(Registry(), config, [kind_of(m).base(m).shape(m)[-2:] for m in modules], loading=True)
    return Plan(skeleton, config, selection, tensors, common, merged, replaced, untied, like, apart, base, new, names)


def _read(folder: Path, shards: dict[str, list[str]], key: str) -> Tensor:
    shard = next(shard for shard, keys in shards.items() if key in keys)
    with open_tensors(folder / shard) as file:
        return file.get_tensor(key)


def merged_shard(path: Path, keys: list[str], plan: Plan, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of one shard of the result."""
    with open_tensors(path) as file:
        for key in keys:
            tensor = file.get_tensor(key)
            tensor = plan.base.get(key, tensor).to(tensor.dtype)
            wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            if key in plan.merged:
                tensor = merged_weight(plan, plan.merged[key], tensor, wanted)
            elif key in plan.replaced:
                tensor = plan.replaced[key]
            yield key, _cast(tensor, wanted)


@torch.no_grad()
def merged_weight(plan: Plan, name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """W' of one module, computed in the wider of the base's dtype and the result's."""
    module = plan.skeleton.get_submodule(name)
    kind, own = kind_of(module), module._parameters
    empty, bias = own[kind.weight_name], own.get(kind.bias_name)
    if weight.shape != empty.shape:
        key = kind.key(name)
        raise UserError(f"{key} has shape {tuple(weight.shape)} in the checkpoint, its config says {tuple(empty.shape)}")
    wide = torch.promote_types(weight.dtype, dtype)
    own[kind.weight_name] = nn.Parameter(weight.to(wide, copy=True), requires_grad=False)
    own |= {kind.bias_name: None} if bias is not None else {}  # which is on the meta device, and not asked
    adapt(module, name, plan.config, plan.selection.ranks[name], plan.selection.alphas[name], trainable=False, common=plan.common)
    put_layer(name, module, plan.tensors)
    adapted = module.adapted
    n = checked_norm(name, adapted)
    for rows, tile in merged_tiles(adapted, n):
        adapted.base.write_rows(module, rows, tile)
    take_off(module)  # what was derived keeps the weight alive
    result = own[kind.weight_name].data
    own |= {kind.weight_name: empty} | ({kind.bias_name: bias} if bias is not None else {})
    return result


def copy_rest(folder: Path, output: Path, dtype: torch.dtype | None, untied: bool, changes: dict) -> None:
    """Configuration, tokenizer, processors and the like; the config says the new dtype and what else is another's now."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt", ".tiktoken", ".md", ".vocab", ".bpe", ".py"):
            if path.name not in _LEFT_BEHIND and not path.name.endswith(".index.json"):
                shutil.copyfile(path, output / path.name)
    if (folder / "modules.json").is_file():  # of sentence-transformers: what comes behind the model has folders of its own
        for name in [path.name for path in sorted(folder.iterdir()) if path.is_dir() and (path / "config.json").is_file()]:
            shutil.copytree(folder / name, output / name)
    config = read_json(output / "config.json", "a model folder needs it") | changes
    config.pop("_name_or_path", None)
    config.pop("_model_name_or_path", None)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config |= {} if is_diffusers(config) else {"dtype": str(dtype).removeprefix("torch.")}
    if untied:
        config["tie_word_embeddings"] = False
    write_json(output / "config.json", config)
    readable_by_both(output)


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype) if t.is_floating_point() else t
