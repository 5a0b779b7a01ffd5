"""Files of other programs as a few lines of text, so that a fuzzer can change names, shapes and settings: read by `convert`.

    name|dtype|2,4          a tensor, filled with small numbers
    @key|value              metadata of the file
    !{"peft_type": "DORA"}  adapter_config.json beside it, as the bytes are

What comes out is a whole adapter folder, which is read again, or nothing at all; nothing else appears anywhere.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from conftest import tiny_llama
from safetensors.torch import save_file

from doratune.checkpoint.adapter import read_folder
from doratune.checkpoint.convert import convert
from doratune.errors import UserError

FOLDER = Path(tempfile.mkdtemp(prefix="conversions_"))
MODEL = tiny_llama(layers=1).to("meta")
MOST_TENSORS, MOST_NUMBERS = 40, 4096
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I64": torch.int64}


def parsed(data: bytes) -> tuple[dict[str, torch.Tensor], dict[str, str], bytes | None]:
    """(tensors, metadata, settings); lines that say nothing are left out."""
    tensors, metadata, settings = {}, {}, None
    for line in data.split(b"\n"):
        if line.startswith(b"!"):
            settings = line[1:]
            continue
        fields = line.decode("utf-8", "replace").split("|")
        if line.startswith(b"@") and len(fields) == 2:
            metadata[fields[0][1:]] = fields[1]
        elif len(fields) == 3 and fields[1] in DTYPES and len(tensors) < MOST_TENSORS:
            sizes = [int(size) for size in fields[2].split(",") if size.isascii() and size.isdigit() and len(size) < 5]
            if torch.Size(sizes).numel() <= MOST_NUMBERS:
                tensors[fields[0]] = _numbers(sizes, DTYPES[fields[1]])
    return tensors, metadata, settings


def _numbers(sizes: list[int], dtype: torch.dtype) -> torch.Tensor:
    count = torch.Size(sizes).numel()
    return (torch.arange(count) % 7 * 0.1 + 0.1).to(dtype).reshape(sizes)


def lines(tensors: dict[str, torch.Tensor], metadata: dict[str, str], settings: bytes | None) -> bytes:
    """The text of a file; the other way round."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    text = [f"{name}|{names[t.dtype]}|{','.join(map(str, t.shape))}" for name, t in tensors.items()]
    text += [f"@{key}|{' '.join(value.split())}" for key, value in (metadata or {}).items()]
    return "\n".join(text).encode() + (b"" if settings is None else b"\n!" + settings)


def converted(data: bytes) -> None:
    """The file, and where it has settings its folder, into PEFT's layout."""
    tensors, metadata, settings = parsed(data)
    source, target = FOLDER / "source", FOLDER / "target"
    for folder in (source, target):
        shutil.rmtree(folder, ignore_errors=True)
    source.mkdir()
    save_file(tensors, source / "adapters.safetensors", metadata)
    if settings is not None:
        (source / "adapter_config.json").write_bytes(settings)
    try:
        convert(source, "peft", target, model=MODEL, component="transformer")
    except UserError:
        assert not target.exists()
        raise
    finally:
        assert {path.name for path in FOLDER.iterdir()} <= {"source", "target"}
    read_folder(target)


def _start(path: Path) -> Path:
    """An adapter of a tiny Llama as PEFT has it."""
    shapes = {"self_attn.q_proj": (32, 32), "mlp.down_proj": (32, 48)}
    tensors = {}
    for name, (rows, columns) in shapes.items():
        key = f"base_model.model.model.layers.0.{name}"
        sizes = {"lora_A.weight": [2, columns], "lora_B.weight": [rows, 2], "lora_magnitude_vector.weight": [rows]}
        tensors |= {f"{key}.{part}": _numbers(size, torch.float32) for part, size in sizes.items()}
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], "use_dora": True}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def _seed(start: Path, to: str) -> bytes:
    """The adapter in this format, as its own writer lays it out."""
    from safetensors import safe_open

    output = FOLDER / f"seed_{to}"
    convert(start, to, output, model=MODEL, component="transformer")
    weights = next(output.glob("*.safetensors"))
    with safe_open(weights, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    settings = output / "adapter_config.json"
    text = lines(tensors, metadata, settings.read_bytes().replace(b"\n", b" ") if settings.exists() else None)
    shutil.rmtree(output)
    return text


def _seeds() -> dict[str, bytes]:
    from doratune.formats import format_names

    start = _start(FOLDER / "start")
    seeds = {name: _seed(start, name) for name in format_names()}
    shutil.rmtree(start)
    return seeds


def spoiled(seed: bytes) -> list[bytes]:
    """The file, and what strangers do to it."""
    first, *rest = seed.split(b"\n")
    name, dtype, sizes = first.split(b"|")
    return [
        seed,
        b"\n".join(rest),  # a tensor is missing
        seed.replace(b",", b",0", 1).replace(b"|2,", b"|0,", 1),
        b"\n".join([name + b"|I64|" + sizes, *rest]),
        b"\n".join([name + b"|" + dtype + b"|", *rest]),  # a number
        b"\n".join([name + b"|" + dtype + b"|1,1,1,1,1", *rest]),
        b"\n".join([name.replace(b".", b"../", 1) + b"|" + dtype + b"|" + sizes, *rest]),
        b"\n".join([b"|" + dtype + b"|" + sizes, *rest]),
        seed + b"\nextra.weight|F32|2,2",
        seed + b"\n@lora_adapter_metadata|[" + b"[" * 500,
        seed + b'\n!{"r": NaN, "lora_alpha": "x", "lora_parameters": {"rank": -1, "scale": []}, "lora_layers": null}',
        seed + b"\n![[[[",
    ]


SEEDS = _seeds()
CONVERTED = [text for seed in SEEDS.values() for text in spoiled(seed)]
