"""Adapters of pipelines: a folder for each part that is adapted, all in one file for diffusers, and merging into a whole pipeline.

    adapter/unet, adapter/text_encoder …        adapter folders as any other: `doratune.load(pipe.unet, "adapter/unet")`
    adapter/pytorch_lora_weights.safetensors    all of them for `pipe.load_lora_weights("adapter")`, where diffusers can say it
    adapter/pipeline.json                       the base, and the parts

Merging writes a pipeline's folder: adapted parts shard by shard, the rest as it is. Cost: that of `merge.py`, one part at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from .. import __version__
from ..adapter.attach import Attachment, adapters, record_of
from ..adapter.states import RECORD
from ..errors import UserError, listed
from ..formats import Stated, format_named
from ..formats.names import COMPONENTS, ModelNames
from ..support.files import read_json, write_json, write_tensors
from ..support.folders import generation, new_folder
from ..support.hub import hub_settings
from ..support.models import readable_errors
from ..support.pipelines import ADAPTER_RECORD, INDEX, is_pipeline
from .adapter import save
from .base_check import header, recorded
from .convert import VERSION, read_own
from .merge import merge_checkpoint

KIND = "diffusers"


def save_pipeline_adapter(model: nn.Module, folder: Path, base: str) -> list[str]:
    """Write the adapter of a module whose children are parts of a pipeline, under their names there.

    Args:
        base: folder or hub id of the pipeline.

    Returns:
        A line on what opens it.
    """
    record = record_of(model)
    parts = {part: module for part, module in model.named_children() if any(True for _ in _inside(record, part))}
    own = (*COMPONENTS, ADAPTER_RECORD, format_named(KIND).file)
    with generation(folder, lambda name: name not in own, key=ADAPTER_RECORD) as stage:
        for part, module in parts.items():
            _save_part(module, _part_of(record, part, dict(adapters(model))), stage / part)
        problem = _write_for_diffusers(parts, stage)
        write_json(stage / ADAPTER_RECORD, {VERSION: __version__, "model": base, "parts": sorted(parts)})
    if problem is None:
        return [f'for diffusers: pipe.load_lora_weights("{folder}")']
    merging = f"doratune merge --adapter {folder} writes a pipeline that it opens"
    return [f"diffusers' load_lora_weights cannot open this adapter: {problem}; {merging}"]


def _inside(record: Attachment, part: str):
    return (name for name in record.alphas if name.startswith(f"{part}."))


def _part_of(record: Attachment, part: str, layers: dict[str, nn.Module]) -> Attachment:
    """The record of one part, as if it had been attached alone; every module by its own name."""
    inside = {name: name.removeprefix(f"{part}.") for name in _inside(record, part)}
    ranks = {short: layers[name].adapted.rank for name, short in inside.items()}
    config, whole = record.config, [name for name in record.also_train if name.startswith(f"{part}.")]
    config = replace(
        config,
        targets=tuple(name for name, rank in ranks.items() if rank),
        magnitude_only=tuple(name for name, rank in ranks.items() if not rank),
        exclude=(),
        layers=(),
        also_train=tuple(name.removeprefix(f"{part}.") for name in whole),
        rank_overrides={name: rank for name, rank in ranks.items() if rank not in (0, config.rank)},
        alpha_overrides={s: record.alphas[n] for n, s in inside.items() if ranks[s] and record.alphas[n] != config.alpha},
    )
    alphas = {short: record.alphas[name] for name, short in inside.items()}
    return replace(record, config=config, names=tuple(ranks), alphas=alphas, also_train=config.also_train, left_out={}, fresh={})


def _save_part(module: nn.Module, record: Attachment, folder: Path) -> None:
    vars(module)[RECORD] = record
    try:
        save(module, folder)
    finally:
        del vars(module)[RECORD]


def _write_for_diffusers(parts: dict[str, nn.Module], folder: Path) -> str | None:
    """Write the parts' adapters into one file of diffusers, or say why its format cannot."""
    kind = format_named(KIND)
    tensors: dict[str, Tensor] = {}
    settings: dict[str, str] = {}
    metadata: dict[str, str] = {}
    norms = {}
    for part, module in parts.items():
        stated = Stated(ModelNames.of(module), part)
        neutral = read_own(folder / part, stated.model)
        if problem := kind.cannot_say(neutral, stated):
            return problem
        written = kind.write(neutral, stated)
        tensors |= written.tensors
        for key, text in written.metadata.items():
            settings |= json.loads(text)
            metadata[key] = json.dumps(settings, indent=2, sort_keys=True)
        norms |= recorded(folder / part) if part == next(iter(parts)) else {}
    write_tensors(folder / kind.file, tensors, metadata | {VERSION: __version__} | header(norms))
    return None


def pipeline_record(folder: Path) -> tuple[str, list[str]]:
    """(the base pipeline, the parts that have an adapter).

    Raises:
        UserError: a damaged record, or a part that is not there.
    """
    record = read_json(folder / ADAPTER_RECORD, "the adapter of a pipeline has it")
    base, parts = record.get("model"), record.get("parts")
    if not isinstance(base, str) or not isinstance(parts, list) or not parts or not set(parts) <= set(COMPONENTS):
        raise UserError(f"{folder / ADAPTER_RECORD} names no base and parts of a pipeline; train or copy the adapter again")
    if missing := [part for part in parts if not (folder / part).is_dir()]:
        raise UserError(f"{folder} lacks {listed(missing)}, which its {ADAPTER_RECORD} names; copy the adapter again")
    return base, parts


def merge_pipeline(
    base: str,
    adapter: Path,
    output: Path,
    dtype: str | None = None,
    overwrite: bool = False,
    check: Callable[[Path, Path, Path], None] | None = None,
    check_base: bool = True,
) -> Path:
    """Write the pipeline with its adapted parts merged, whole or not at all.

    Args:
        dtype: of the merged parts; None: as they are. check: looks at (base part, adapter, merged part); what it raises leaves
            `output` as it was.

    Raises:
        UserError: as `merge.merge_checkpoint`; a base that is no pipeline, or lacks a part.
    """
    folder, parts = pipeline_folder(base), pipeline_record(adapter)[1]
    if missing := [part for part in parts if not (folder / part / "config.json").is_file()]:
        raise UserError(f"{base} has no {listed(missing)}, of which {adapter} holds an adapter; give the pipeline under it")
    with new_folder(output, overwrite, key=INDEX) as temporary:
        for part in parts:
            seen = None if check is None else lambda merged, part=part: check(folder / part, adapter / part, merged)
            merge_checkpoint(str(folder / part), adapter / part, temporary / part, dtype, False, seen, check_base)
        for entry in sorted(folder.iterdir()):
            if entry.is_dir() and entry.name not in parts and not entry.name.startswith("."):
                shutil.copytree(entry, temporary / entry.name)
        shutil.copyfile(folder / INDEX, temporary / INDEX)
    return output


def pipeline_folder(base: str) -> Path:
    """The local folder of a pipeline, from the hub's cache if need be.

    Raises:
        UserError: it is none.
    """
    if is_pipeline(base):
        return Path(base)
    if Path(base).exists() or base.count("/") > 1:
        raise UserError(f"{base} is no pipeline of diffusers ({INDEX}); give the folder of the whole pipeline")
    from huggingface_hub import snapshot_download

    with readable_errors(base):
        folder = Path(snapshot_download(base, ignore_patterns=["*.bin", "*.ckpt", "*.msgpack", "*.onnx*"], **hub_settings(base)))
    if not is_pipeline(folder):
        raise UserError(f"{base} is no pipeline of diffusers ({INDEX}); give a hub id of one")
    return folder
