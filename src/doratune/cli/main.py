"""`doratune COMMAND …`: a table of names; each command's file is imported only when it runs, so --help is instant.

User errors are one line on standard error and exit status 2; signals exit with 128 + their number; no traceback for either.
"""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "demo": "fine-tune a real 135M model with DoRA, score it before and after, merge it",
    "train": "train an adapter as a recipe says",
    "evaluate": "score a model or adapter on the commonsense tasks",
    "merge": "merge an adapter into its base: an ordinary transformers folder",
    "export": "for engines without DoRA: GGUF, LoRA + output scale, plain LoRA by truncated SVD",
    "extract": "a DoRA adapter out of a base and a fully fine-tuned model",
    "generate": "answers to many prompts, as JSON lines",
    "chat": "talk with a model and its adapters in the terminal",
    "compare": "methods × ranks × seeds on one recipe, with intervals, paired tests and cost",
    "analyze": "how far magnitude and direction moved, with figures",
    "report": "one HTML page about runs: settings, curves, scores, costs, movement, samples",
    "inspect": "what an adapter adapts in a model, what is left out, rows without direction",
    "bench": "time and memory of DoRA, LoRA, PEFT's and the frozen base, interleaved",
}

USAGE = "usage: doratune COMMAND [options]\n\n" + "\n".join(f"  {name:<10}{what}" for name, what in COMMANDS.items())
USAGE += "\n\n  doratune COMMAND --help shows a command's options and an example.\n"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if argv[0] in ("--version", "version"):
        from .. import __version__

        print(f"doratune {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        from ..errors import near_misses

        print(f"doratune: unknown command {argv[0]!r}{near_misses(argv[0], COMMANDS)}", file=sys.stderr)
        return 2
    return _run(argv[0], argv[1:])


def _run(command: str, arguments: list[str]) -> int:
    from ..errors import UserError

    try:
        return importlib.import_module(f".{command}", __package__).main(arguments) or 0
    except UserError as error:
        print(f"doratune {command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"doratune {command}: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("doratune"):
            raise
        print(f"doratune {command}: needs {error.name}; pip install 'doratune[train,plots,report]'", file=sys.stderr)
        return 2


def entry() -> None:
    sys.exit(main())
