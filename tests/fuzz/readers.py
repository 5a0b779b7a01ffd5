"""What reads files that strangers wrote, one entry a reader: bytes in, a value or a UserError out, and nothing else.

python tests/fuzz/readers.py NAME [SECONDS]     coverage-guided, where atheris is installed; starts from tests/fuzz/corpus/NAME
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

if __name__ == "__main__":
    import atheris

    with atheris.instrument_imports(include=["doratune"]):
        import doratune.checkpoint.adapter
        import doratune.checkpoint.convert
        import doratune.data.files
        import doratune.formats.source
        import doratune.serving.app
        import doratune.support.yaml_text  # noqa: F401

from conversions import CONVERTED, converted
from http_requests import REQUESTS, asked

from doratune.checkpoint.adapter import read_folder
from doratune.data.files import read_examples
from doratune.errors import UserError
from doratune.formats.source import json_object, read_weights
from doratune.support.files import read_json, shard_files
from doratune.support.yaml_text import read_yaml

FOLDER = Path(tempfile.mkdtemp(prefix="readers_"))
CORPUS = Path(__file__).parent / "corpus"


def written(name: str, data: bytes) -> Path:
    path = FOLDER / name
    path.write_bytes(data)
    return path


def adapter_json(data: bytes) -> None:
    """adapter_config.json of an adapter folder with one layer."""
    folder = FOLDER / "adapter"
    folder.mkdir(exist_ok=True)
    weights = folder / "adapter_model.safetensors"
    if not weights.exists():
        from safetensors.torch import save_file

        save_file(
            {"base_model.model.q.lora_A.weight": torch.ones(2, 4), "base_model.model.q.lora_B.weight": torch.ones(4, 2)}, weights
        )
    (folder / "adapter_config.json").write_bytes(data)
    read_folder(folder)


def safetensors_header(data: bytes) -> None:
    read_weights(written("x.safetensors", data))


def recipe(data: bytes) -> None:
    read_yaml(written("r.yaml", data))


def jsonl(data: bytes) -> None:
    read_examples(written("x.jsonl", data))


def index(data: bytes) -> None:
    path = written("model.safetensors.index.json", data)
    for name in shard_files(path).values():
        assert (FOLDER / name).resolve().is_relative_to(FOLDER.resolve())


def metadata(data: bytes) -> None:
    json_object(data.decode("utf-8", "replace"), "metadata")
    read_json(written("m.json", data), "it is read")


READERS = {
    "adapter_json": adapter_json,
    "safetensors_header": safetensors_header,
    "recipe": recipe,
    "jsonl": jsonl,
    "index": index,
    "metadata": metadata,
    "conversion": converted,
    "http": asked,
}


def header(entries) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def tensor(shape, offsets, dtype="F32") -> dict:
    return {"q.lora_A.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


HOSTILE = {
    "adapter_json": [
        b"[" * 100_000,
        b'{"peft_type": "LORA", "r": 1' + b"0" * 6000 + b"}",
        b'{"peft_type": "LORA", "r": NaN, "target_modules": ["q"]}',
        b'{"peft_type": "LORA", "r": 4, "lora_alpha": Infinity, "target_modules": ["q"]}',
        b'{"peft_type": "LORA", "r": 4, "r": 8, "target_modules": ["q"]}',
        b'{"peft_type": "LORA", "r": 4, "rank_pattern": {"q": -1}, "target_modules": ["q"]}',
        b'{"peft_type": "LORA", "r": 4, "rank_pattern": [1], "target_modules": ["q"]}',
        b'{"peft_type": "LORA", "r": 4, "target_modules": {"q": 1}}',
        b'{"peft_type": "LORA", "r": 4, "target_modules": "(a+)+$"}',
        b'{"peft_type": "LORA", "r": 4, "alpha_pattern": {"q": NaN}, "target_modules": ["q"]}',
        b'{"peft_type": ["LORA"], "r": 4}',
        b'{"peft_type": {}, "r": 4}',
        b"\xff\xfe{}",
        b"null",
        b"",
    ],
    "safetensors_header": [
        (2**60).to_bytes(8, "little") + b"{}",
        header({}),
        header(tensor([2**40, 2**40], [0, 8])),
        header(tensor([2], [0, 8])),
        header(tensor([2], [8, 0])) + b"\0" * 8,
        header({"a": tensor([2], [0, 8])["q.lora_A.weight"], "b": tensor([2], [4, 12])["q.lora_A.weight"]}) + b"\0" * 12,
        header(b"[" * 50_000),
        header(tensor([2], [0, 8], "Z9")) + b"\0" * 8,
        header({"__metadata__": {"a": 1}}),
        b"",
        b"\x80\x04K\x01.",
    ],
    "recipe": [
        b"a: !!python/object/apply:os.system ['true']",
        b"k0: &k0 [x, x]\n" + b"".join(b"k%d: &k%d [*k%d, *k%d, *k%d]\n" % (i, i, *[i - 1] * 3) for i in range(1, 20)),
        b"[" * 10_000,
        b"a: &a [*a]",
        b"\0",
        b"a: 1" + b"0" * 6000,
        b"? {a: b}\n: c",
    ],
    "jsonl": [b"[" * 100_000, b'{"a": 1' + b"0" * 6000 + b"}", b"{}\nnull\n", b"\xff", b'{"a": NaN}', b"1\n2"],
    "index": [
        b'{"weight_map": {"a": "../x.safetensors"}}',
        b'{"weight_map": {"a": "/etc/passwd"}}',
        b'{"weight_map": {"a": "sub/../../x"}}',
        b'{"weight_map": {"a": 3}}',
        b'{"weight_map": ["a"]}',
        b'{"weight_map": {"a": "C:\\\\x"}}',
        b'{"weight_map": {"a": ""}}',
        b'{"weight_map": {"a": "x\\u0000y"}}',
        b"{}",
    ],
    "metadata": [b"[" * 100_000, b'{"a": 1, "a": 2}', b"{" * 1000, b"\xc3"],
    "conversion": CONVERTED,
    "http": REQUESTS,
}


HARMLESS = {
    "adapter_json": [b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "use_dora": false}'],
    "safetensors_header": [
        header(tensor([2], [0, 8])) + b"\0" * 8,
        header(tensor([1, 2], [0, 4], "BF16") | {"__metadata__": {"format": "pt"}}) + b"\0" * 4,
        header({"a": tensor([], [0, 2], "F16")["q.lora_A.weight"], "b": tensor([0, 3], [2, 2])["q.lora_A.weight"]}) + b"\0" * 2,
    ],
    "recipe": [b"model: a\ndata: b.jsonl\nrank: 8\ntargets: [q_proj, v_proj]\nlr: 1.0e-4\n"],
    "jsonl": [b'{"prompt": "a", "completion": "b"}\n', b'{"messages": [{"role": "user", "content": "a"}]}\n'],
    "index": [b'{"metadata": {"total_size": 8}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'],
    "metadata": [b'{"a": 1}'],
}
"""Inputs that are read: without them a fuzzer rarely comes behind what refuses."""


def run(name: str, data: bytes) -> str | None:
    """The reader's message; None where it reads the bytes. Anything but a UserError of one line comes through."""
    try:
        READERS[name](data)
    except UserError as error:
        message = str(error)
    else:
        return None
    assert "\n" not in message and len(message) < 2000, message
    return message


def main() -> None:
    name, seconds = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "300"
    seeds = FOLDER / "seeds"
    seeds.mkdir()
    for number, data in enumerate(
        [*HOSTILE[name], *HARMLESS.get(name, ()), *(path.read_bytes() for path in (CORPUS / name).glob("*"))]
    ):
        (seeds / str(number)).write_bytes(data[:20_000])
    atheris.Setup([sys.argv[0], str(seeds), f"-max_total_time={seconds}", "-timeout=20", "-max_len=4096"], lambda d: run(name, d))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
