"""`doratune chat --adapter A [--adapter B] [--compare]`."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field
from typing import Literal

from ..support.devices import Device
from ..support.values import number
from .arguments import parse
from .inputs import refuse_missing
from .output import keep_freed_memory, say_next
from .repeated import gathered

EXAMPLE = "doratune chat --adapter runs/demo/adapter --compare --template instruction"


@dataclass(kw_only=True)
class ChatSettings:
    """Talk with a model in the terminal. /help lists what can be said to the program itself.

    Args:
        model: hub id, local folder, or smollm2-135m-instruct; default: the base model that the first adapter records
        adapter: adapter folders, or NAME=FOLDER; may be given more than once; the first is in use, /use NAME takes another
        compare: the base model answers too, before the adapter
        template: chat (the tokenizer's), instruction (as instruction data is trained; no history), plain, or auto
        system: system prompt
        temperature: 0 takes the most probable token
        top_p: only the most probable tokens that make up this share
        max_new_tokens: longest answer
        seed: of sampling
        dtype: dtype of the model
        device: cpu, cuda, mps or xpu; auto: the accelerator where there is one
        check_base: refuse a base whose row norms are not those of the base that the adapter was trained on
        quantize: recorded (as the adapters were trained), none, nf4, fp4 or int8
        trust_remote_code: run the Python code that the model's folder or repository brings
    """

    model: str | None = None
    adapter: list[str] = field(default_factory=list)
    compare: bool = False
    template: Literal["auto", "chat", "instruction", "plain"] = "auto"
    system: str | None = None
    temperature: float = number(0.7, least=0)
    top_p: float = number(0.95, above=0, most=1)
    max_new_tokens: int = number(512, least=1)
    seed: int = number(0, least=0)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Device = "auto"
    check_base: bool = True
    quantize: Literal["recorded", "none", "nf4", "fp4", "int8"] = "recorded"
    trust_remote_code: bool = False


def main(argv: list[str]) -> int:
    settings, _ = parse(ChatSettings, gathered(argv, "adapter"), "chat", EXAMPLE)
    keep_freed_memory()
    from ..errors import UserError
    from ..generation.adapters import BASE, NamedAdapters, named
    from ..generation.conversation import Conversation
    from ..generation.sampling import Sampling

    refuse_missing({}, {"adapter": list(named(settings.adapter).values())})
    sampling = Sampling(settings.temperature, settings.top_p, settings.max_new_tokens, settings.seed)
    adapters = NamedAdapters(
        settings.model,
        settings.adapter,
        settings.dtype,
        settings.quantize,
        settings.trust_remote_code,
        settings.check_base,
        settings.device,
    )
    speaker = next(iter(adapters.folders), BASE)
    chat = Conversation(adapters, sampling, _write, settings.template, settings.system, settings.compare, speaker)
    adapters.use(speaker)
    _write(f"{adapters.base}, {speaker}; /help lists commands, Ctrl-D ends\n")
    if sys.stdin.isatty():
        with contextlib.suppress(ModuleNotFoundError):  # Windows edits lines by itself
            import readline  # noqa: F401 (input() edits lines with it)
    while True:
        try:
            line = input("you> ")
        except EOFError:
            _write("\n")
            return _left(adapters)
        except KeyboardInterrupt:
            _write("\n(Ctrl-D or /quit ends the chat)\n")
            continue
        try:
            if not chat.take(line):
                return _left(adapters)
        except UserError as error:
            _write(f"{' '.join(str(error).split())}\n")
        except KeyboardInterrupt:
            _write("\n")


def _left(adapters) -> int:
    """The end of a chat, with what can be done with the adapters."""
    for folder in list(adapters.folders.values())[:1]:
        say_next(("merge", "--adapter", folder, "--output", "merged"), ("serve", "--adapter", folder))
    return 0


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
