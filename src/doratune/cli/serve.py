"""`doratune serve --adapter A [--adapter B]`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..support.devices import Device
from ..support.values import number
from .arguments import parse
from .inputs import refuse_missing
from .output import keep_freed_memory, say
from .repeated import gathered

EXAMPLE = "doratune serve --adapter runs/demo/adapter --adapter style=runs/style/adapter --port 8000"


@dataclass(kw_only=True)
class ServeSettings:
    """Serve a model and its adapters under OpenAI's API, to try them out: each request's `model` names an adapter, or the base.

    Args:
        model: hub id, local folder, or smollm2-135m-instruct; default: the base model that the first adapter records
        adapter: adapter folders, or NAME=FOLDER; may be given more than once
        host: address to listen on; others than this machine's own need a key, in the environment: DORATUNE_API_KEY
        port: 0 takes one that is free
        template: of chats: chat (the tokenizer's), instruction (as instruction data is trained; one message), plain, or auto
        batch_size: answers written at the same time
        max_queue: answers that may wait
        max_new_tokens: longest answer
        max_prompt_tokens: longest prompt; default: what the model has room for
        max_body_kib: largest body of a request
        dtype: dtype of the model
        device: cpu, cuda, mps or xpu; auto: the accelerator where there is one
        quantize: recorded (as the adapters were trained), none, nf4, fp4 or int8
        trust_remote_code: run the Python code that the model's folder or repository brings
    """

    model: str | None = None
    adapter: list[str] = field(default_factory=list)
    host: str = "127.0.0.1"
    port: int = number(8000, least=0, most=65535)
    template: Literal["auto", "chat", "instruction", "plain"] = "auto"
    batch_size: int = number(16, least=1)
    max_queue: int = number(256, least=1)
    max_new_tokens: int = number(1024, least=1)
    max_prompt_tokens: int | None = number(None, least=1)
    max_body_kib: int = number(1024, least=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Device = "auto"
    quantize: Literal["recorded", "none", "nf4", "fp4", "int8"] = "recorded"
    trust_remote_code: bool = False


def main(argv: list[str]) -> int:
    settings, _ = parse(ServeSettings, gathered(argv, "adapter"), "serve", EXAMPLE)
    keep_freed_memory()
    from ..generation.adapters import NamedAdapters, named
    from ..serving.server import address_of, bound, key, listen

    refuse_missing({}, {"adapter": list(named(settings.adapter).values())})
    api_key = key()
    with bound(settings.host, settings.port, api_key) as sock:
        loading = settings.dtype, settings.quantize, settings.trust_remote_code
        adapters = NamedAdapters(settings.model, settings.adapter, *loading, device=settings.device)
        service = _service(settings, adapters, api_key)
        service.engine.start()
        sock.listen(128)
        say(f"{address_of(sock)}/v1 serves {', '.join(service.listed)}; Ctrl-C ends")
        status = listen(service.app(), sock, service.engine.stop)
    if status:
        print("doratune serve: terminated", file=sys.stderr)
    return status


def _service(settings: ServeSettings, adapters, api_key: str | None):
    from ..errors import UserError
    from ..generation.adapters import BASE
    from ..serving.app import Service
    from ..serving.engine import Engine
    from ..serving.guard import Guard
    from ..serving.prompts import Lengths, Prompts
    from ..serving.server import own_names

    base = Path(adapters.base).resolve().name if Path(adapters.base).is_dir() else adapters.base
    if base in adapters.folders:
        raise UserError(f"adapter {base!r} has the base model's name; give it another, as NAME={adapters.folders[base]}")
    adapters.load_all()
    names = adapters.inside | {base: None, BASE: None}
    config = adapters.model.config
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    lengths = Lengths(positions, settings.max_prompt_tokens, settings.max_new_tokens)
    prompts = Prompts(adapters.tokenizer, adapters.model.get_input_embeddings().num_embeddings, settings.template)
    guard = Guard(api_key, own_names(settings.host, api_key), settings.max_body_kib * 1024)
    engine = Engine(adapters, settings.batch_size, settings.max_queue)
    return Service(engine, prompts, lengths, guard, names, [base, *adapters.folders])
