"""A GGUF file of a model folder or of base + adapter, for llama.cpp and Ollama: merged weights, metadata, tokenizer, chat template.

    f32 | f16 | bf16 | q8_0 for every matrix, rows that are no multiple of 32 as f16 in q8_0; vectors in f32

The file is written tensor by tensor with the `gguf` package's writer: memory is that of the largest tensor in fp32. The folder is
whole or absent. Cost: one pass over the model; q8_0 quantizes in numpy, about 100 MB of fp32 a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..config import check_choice
from ..errors import UserError
from ..support.folders import new_folder, refuse_existing
from ..support.models import load_tokenizer, readable_errors
from .families import Family, as_stored, describe, extra_tensors, family_of
from .ollama import modelfile
from .tokenizer import add_tokenizer
from .weights import Weights

TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
SKIPPED = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


@dataclass(frozen=True)
class GgufExport:
    """What was written; `notes`: what llama.cpp does otherwise."""

    file: Path
    tensors: int
    nbytes: int
    notes: list[str]


def export_gguf(
    base: str,
    adapter: str | Path | None,
    output: str | Path,
    type: str = "f16",
    overwrite: bool = False,
    check_base: bool = True,
) -> GgufExport:
    """Write OUTPUT/NAME-TYPE.gguf and OUTPUT/Modelfile.

    Args:
        base: local folder, hub id or smollm2-135m-instruct; adapter: merged into it, None for the model as it is.
        type: of the matrices: f32, f16, bf16 or q8_0; check_base: as `doratune.load`.

    Raises:
        UserError: an architecture, a setting, a tokenizer or a tensor that llama.cpp does not take; values beyond float16.
    """
    from transformers import AutoConfig

    check_choice("type", type, tuple(TYPES))
    output = Path(output)
    if output.suffix == ".gguf":
        raise UserError(
            f"output is {output}; give a folder, e.g. --output {output.with_suffix('')}: the file comes with a Modelfile"
        )
    refuse_existing(output, overwrite)
    weights = Weights(base, adapter, check_base)
    with readable_errors(base):
        config = AutoConfig.from_pretrained(weights.folder, trust_remote_code=False)
    family = family_of(config, base)
    tokenizer = load_tokenizer(base)
    names = tensor_names(weights, config, family)
    with new_folder(output, overwrite) as folder:
        file = folder / f"{output.resolve().name}-{type}.gguf"
        notes = _write(file, weights, config, family, tokenizer, names, type)
        (folder / "Modelfile").write_text(modelfile(tokenizer, file.name), encoding="utf-8")
    written = output / file.name
    return GgufExport(written, len(names), written.stat().st_size, notes)


def tensor_names(weights: Weights, config, family: Family) -> dict[str, str]:
    """{key in the checkpoint: GGUF's name}, without what GGUF leaves out (a head that is the embedding).

    Raises:
        UserError: a tensor that the architecture does not have there.
    """
    import gguf

    architecture = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    known = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tied = config.tie_word_embeddings and not weights.untied
    names = {}
    for key in weights.shapes():
        if key.endswith(SKIPPED) or (tied and key == "lm_head.weight"):
            continue
        name = known.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(
                f"{weights.folder}: {key} has no place in GGUF's {family.architecture}; the model is not an ordinary one"
            )
        names[key] = name
    return names


def _write(file: Path, weights: Weights, config, family: Family, tokenizer, names: dict[str, str], type: str) -> list[str]:
    """Metadata and what tensors there will be first, then their values one by one; returns the notes."""
    import gguf

    writer = gguf.GGUFWriter(None, family.architecture)
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(Path(weights.base).name)
        writer.add_file_type(gguf.LlamaFileType[TYPES[type]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        notes = describe(writer, config, family)
        add_tokenizer(writer, tokenizer, config.vocab_size, weights.folder)
        extra, shapes = extra_tensors(config), weights.shapes()
        for name, shape in {name: tuple(t.shape) for name, t in extra.items()}.items():
            _announce(writer, name, shape, gguf.GGMLQuantizationType.F32)
        for key, name in names.items():
            _announce(writer, name, shapes[key], _stored_type(shapes[key], type))
        writer.write_header_to_file(path=file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for t in extra.values():
            writer.write_tensor_data(t.numpy())
        for key, t in _in_order(weights, names):
            writer.write_tensor_data(_packed(key, as_stored(key, t, config, family), type))
    finally:
        writer.close()
    return notes


def _in_order(weights: Weights, names: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that are written, in the order in which they were announced."""
    pairs = ((key, t) for key, t in weights if key in names)
    for expected, (key, t) in zip(names, pairs, strict=True):
        assert key == expected, f"{key} came where {expected} was announced"
        yield key, t


def _stored_type(shape: tuple[int, ...], type: str):
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType[type.upper()] if len(shape) > 1 else GGMLQuantizationType.F32
    return kind if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else GGMLQuantizationType.F16


def _announce(writer, name: str, shape: tuple[int, ...], kind) -> None:
    import gguf
    import numpy

    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    numbers = int(torch.Size(shape).numel())
    writer.add_tensor_info(name, shape, numpy.dtype("float32"), numbers // block * block_bytes, raw_dtype=kind)


def _packed(key: str, t: Tensor, type: str):
    """The tensor's numbers as they lie in the file."""
    import gguf

    kind = _stored_type(tuple(t.shape), type)
    half = kind in (gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.Q8_0)  # q8_0 has its scales in float16
    scale = 127 if kind == gguf.GGMLQuantizationType.Q8_0 else 1
    if not torch.isfinite(t).all():
        raise UserError(f"{key} holds NaN or infinite values; there is nothing to export")
    if half and not (t.abs().max() / scale if t.numel() else t.new_zeros(())) <= torch.finfo(torch.float16).max:
        raise UserError(f"{key} holds values beyond float16's range; take --type bf16")
    return gguf.quants.quantize(t.numpy(), kind)
