"""`doratune COMMAND …`: a table of names; each command's file is imported only when it runs, so --help is instant.

User errors are one line on standard error and exit status 2, as are those of the system (a full disk, no permission); signals exit
with 128 + their number; no traceback for any of them. Of several processes, the first speaks.
"""

from __future__ import annotations

import importlib
import os
import sys

COMMANDS = {
    "demo": "fine-tune a real 135M model with DoRA, score it before and after, merge it",
    "init": "a recipe that fits your model, data and memory, with a reason beside each number",
    "data": "what a model sees of a data set, and what is wrong with it",
    "plan": "the memory of a training run before it runs: term by term, does it fit, what would",
    "train": "train an adapter as a recipe says",
    "runs": "the runs in a folder: running, interrupted or finished, with steps and scores",
    "evaluate": "score a model or adapter on the commonsense tasks",
    "merge": "merge an adapter into its base: an ordinary transformers folder",
    "convert": "an adapter into another program's format: PEFT, kohya, diffusers, torchtune, mlx-lm …",
    "export": "for engines without DoRA: GGUF, LoRA + output scale, plain LoRA by truncated SVD",
    "extract": "a DoRA adapter out of a base and a fully fine-tuned model",
    "generate": "answers to many prompts, as JSON lines",
    "chat": "talk with a model and its adapters in the terminal",
    "push": "an adapter or merged model to a model hub, with its card",
    "serve": "a model and its adapters under OpenAI's API, to try them out",
    "compare": "methods × ranks × seeds on one recipe, with intervals, paired tests and cost",
    "analyze": "how far magnitude and direction moved, with figures",
    "report": "one HTML page about runs: settings, curves, scores, costs, movement, samples",
    "inspect": "what an adapter adapts in a model, what is left out, rows without direction",
    "doctor": "what this environment has and lacks: Python, torch, devices, extras",
    "bench": "time and memory of DoRA, LoRA, PEFT's and the frozen base, interleaved",
}

OF_SEVERAL = ("train", "inspect", "plan", "doctor")
"""Commands that several processes of one launch may run: training together, or writing nothing."""

USAGE = "usage: doratune COMMAND [options]\n\n" + "\n".join(f"  {name:<10}{what}" for name, what in COMMANDS.items())
USAGE += "\n\n  doratune COMMAND --help shows a command's options and an example.\n"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if argv[0] in ("--version", "version"):
        print(_version())
        return 0
    if argv[0] not in COMMANDS:
        from ..errors import near_misses

        print(f"doratune: unknown command {argv[0]!r}{near_misses(argv[0], COMMANDS)}", file=sys.stderr)
        return 2
    return _run(argv[0], argv[1:])


def _run(command: str, arguments: list[str]) -> int:
    from ..errors import UserError

    try:
        if command not in OF_SEVERAL and not {"-h", "--help"} & set(arguments):
            _refuse_several(command)
        status = importlib.import_module(f".{command}", __package__).main(arguments) or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        if type(error).__name__ != "SaidByFirst":
            _say(command, str(error))
        return 2
    except BrokenPipeError:  # the reader of standard output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (OSError, RuntimeError) as error:
        from ..support.durable import write_problem

        reason = write_problem(error) or (error.strerror if isinstance(error, OSError) else None)
        if reason is None:
            raise
        where = getattr(error, "filename", None)
        _say(command, f"{where}: {reason}" if where else reason)
        return 2
    except KeyboardInterrupt:
        print(f"doratune {command}: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("doratune"):
            raise
        from ..support.packages import install_line

        print(f"doratune {command}: needs {error.name}; {install_line(error.name or 'doratune')}", file=sys.stderr)
        return 2


def _version() -> str:
    """What runs, and on what: read from the metadata, nothing is imported."""
    from .. import __version__
    from ..support.packages import versions

    return f"doratune {__version__} ({', '.join(f'{name} {version}' for name, version in versions().items())})"


def _refuse_several(command: str) -> None:
    if any(name in os.environ for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")):
        from ..support.processes import refuse_several

        refuse_several(f"doratune {command}")


def _say(command: str, text: str) -> None:
    """One line on standard error, of the first process, or of another where it alone has something to say."""
    from ..support.processes import is_first, rank

    name = f"doratune {command}" if is_first() else f"doratune {command} (process {rank()})"
    print(f"{name}: {' '.join(text.split())}", file=sys.stderr)


WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""What says how an OpenMP thread waits for the next piece of work."""


def share_cores() -> None:
    """Let OpenMP's threads sleep soon instead of spinning, unless the user says how they wait; before torch loads.

    They spin for milliseconds by default: beside another process that does the same, a step of two threads takes 4 to 100 times
    as long. With 1,000 turns it takes twice as long there, as half a machine should, and what it takes alone (docs/log.md)."""
    if not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = "1000"


def entry() -> None:
    """The process of `doratune`."""
    share_cores()
    sys.exit(main())
