"""`doratune COMMAND …`: a table of names; each command's file is imported only when it runs, so --help is instant.

User errors are one line on standard error and exit status 2, as are those of the system (a full disk, no permission); signals exit
with 128 + their number; no traceback for any of them. Of several processes, the first speaks.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator

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
    "completion": "a script that lets the shell complete commands and settings",
    "bench": "time and memory of DoRA, LoRA, PEFT's and the frozen base, interleaved",
}

OF_SEVERAL = ("train", "inspect", "plan", "doctor", "completion")
"""Commands that several processes of one launch may run: training together, or writing nothing."""

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many processes there are: looked at here, since reading them in support/processes.py imports torch."""

USAGE = "usage: doratune COMMAND [options]\n\n" + "\n".join(f"  {name:<12}{what}" for name, what in COMMANDS.items())
USAGE += "\n\n  doratune COMMAND --help shows a command's options and an example.\n"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        return _guarded("", lambda: print(USAGE))
    if argv[0] in ("--version", "version"):
        return _guarded("", lambda: print(_version()))
    if argv[0] not in COMMANDS:
        from ..errors import near_misses

        _say("", f"unknown command {argv[0]!r}{near_misses(argv[0], COMMANDS)}")
        return 2
    return _guarded(argv[0], lambda: _run(argv[0], argv[1:]))


def _run(command: str, arguments: list[str]) -> int:
    if command not in OF_SEVERAL and not {"-h", "--help"} & set(arguments):
        _refuse_several(command)
    return importlib.import_module(f".{command}", __package__).main(arguments) or 0


def _guarded(command: str, call: Callable[[], int | None]) -> int:
    """The exit status of what is called, with one line instead of a traceback where a user or the system is at fault."""
    from ..errors import UserError

    try:
        with _written():
            return call() or 0
    except UserError as error:
        if type(error).__name__ != "SaidByFirst":
            _say(command, str(error))
        return 2
    except BrokenPipeError:  # who read our output has gone
        _write_no_more()
        return 141
    except (OSError, RuntimeError) as error:
        from ..support.durable import write_problem

        reason = write_problem(error) or (error.strerror or str(error) if isinstance(error, OSError) else None)
        if not reason:
            raise
        where = getattr(error, "filename", None)
        _say(command, f"{where}: {reason}" if where else reason)
        _write_no_more()
        return 2
    except KeyboardInterrupt:
        _say(command, "interrupted")
        return 130
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("doratune"):
            raise
        from ..support.packages import install_line

        _say(command, f"needs {error.name}; {install_line(error.name or 'doratune')}")
        return 2
    except ImportError as error:  # a package that is broken, or of a version that lacks what is used here
        if (error.name or "").startswith("doratune"):
            raise
        from ..support.packages import wanted_by

        _say(
            command, wanted_by(str(error)) or f"a package does not load ({str(error)[:300]}); doratune doctor shows their versions"
        )
        return 2


@contextlib.contextmanager
def _written() -> Iterator[None]:
    """What the block printed has left the process when it ends well, or with --help."""
    try:
        yield
    except SystemExit:
        _flush()
        raise
    _flush()


def _flush() -> None:
    if sys.stdout is not None:  # closed by who started us
        sys.stdout.flush()


def _write_no_more() -> None:
    """Where a standard stream takes no more, let what it holds go nowhere: Python would stumble over it at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _version() -> str:
    """What runs, and on what: read from the metadata, nothing is imported."""
    from .. import __version__
    from ..support.packages import versions

    return f"doratune {__version__} ({', '.join(f'{name} {version}' for name, version in versions().items())})"


def _refuse_several(command: str) -> None:
    if any(name in os.environ for name in SIZES):
        from ..support.processes import refuse_several

        refuse_several(f"doratune {command}")


def _say(command: str, text: str) -> None:
    """One line on standard error, of the first process, or of another where it alone has something to say."""
    name = f"doratune {command}".strip()
    if any(variable in os.environ for variable in SIZES):
        from ..support.processes import is_first, rank

        name += "" if is_first() else f" (process {rank()})"
    try:
        print(f"{name}: {' '.join(text.split())}", file=sys.stderr)
    except OSError:  # nobody reads it
        _write_no_more()


WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""What says how an OpenMP thread waits for the next piece of work."""


def share_cores() -> None:
    """Let OpenMP's threads sleep soon instead of spinning, unless the user says how they wait; before torch loads.

    They spin for milliseconds by default: beside another process that does the same, a step of two threads takes 4 to 100 times
    as long. With 1,000 turns it takes twice as long there, as half a machine should, and what it takes alone (docs/log.md)."""
    if not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = "1000"


def show_every_character() -> None:
    """Escapes for the characters that the output's encoding lacks (ΔM in a code page of Windows) instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and (stream.encoding or "").lower() not in ("utf-8", "utf8"):
            stream.reconfigure(errors="backslashreplace")


TALKATIVE = ("torchao", "bitsandbytes", "torch.utils._pytree", "lm_eval", "ray._private", "uvicorn")
"""Loggers of packages that, while they load or run, tell of their own parts; training loads most of them."""


VERBOSITIES = ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY")
"""Where packages read, while they load, from which level on they speak."""


def quiet_others() -> None:
    """Leave out what other packages say to their own developers, unless Python was asked for warnings (-W, PYTHONWARNINGS) or the
    package's own variable says what it tells."""
    if sys.warnoptions:
        return
    warnings.simplefilter("ignore", FutureWarning)
    for variable in VERBOSITIES:
        os.environ.setdefault(variable, "error")
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)


def entry() -> None:
    """The process of `doratune`."""
    share_cores()
    show_every_character()
    quiet_others()
    sys.exit(main())
