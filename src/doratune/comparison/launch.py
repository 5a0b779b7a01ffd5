"""Running the cells of one stage: one after the other on this machine, or all at once on a Ray cluster that shares the folders.

A cell is a process of its own, `doratune train …`; its output goes to LOGS/CELL.log. A cell that fails does not stop the others.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import UserError

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

Job = tuple[str, list[str], str]
"""(name, words of the command, log file)."""


class Stopped(Exception):
    """A signal stopped the grid; the cell that ran wrote a checkpoint."""

    def __init__(self, number: int):
        super().__init__(f"stopped by signal {number}; give the same command to go on")
        self.status = 128 + number


def program(words: list[str]) -> list[str]:
    """The command as this Python runs it."""
    return [sys.executable, "-m", "doratune.cli", *words]


def run_local(jobs: list[Job], done: Callable[[str, int], None]) -> None:
    """One after the other; done(name, exit status) after each.

    Raises:
        Stopped: SIGINT or SIGTERM arrived; the running cell was asked to stop and has.
    """
    for name, words, log in jobs:
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as file, _held_signals() as received:
            # A session of its own: a Ctrl-C reaches the cell once, through us. Should we be killed, the cell is told to stop.
            process = subprocess.Popen(
                program(words),
                stdout=file,
                stderr=subprocess.STDOUT,
                close_fds=False,
                start_new_session=True,
                **({"preexec_fn": _stop_with_parent} if os.name == "posix" else {}),
            )
            first, status = 0, None
            while status is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(0.2)
                while received and status is None:
                    number = received.pop(0)
                    first = first or number
                    process.send_signal(number)
            if first or received:
                raise Stopped(first or received[0])
        done(name, status)


def _stop_with_parent() -> None:
    """On Linux, the kernel sends this process SIGTERM when its parent ends, however it ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the cells that are started inherit; where the system locks no files, nothing is held.

    Raises:
        UserError: another process, or a cell that outlived it, works in this folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    with open(folder / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{folder} is in use by another doratune compare, or by a cell that it left; wait until it ends"
            ) from None
        os.set_inheritable(file.fileno(), True)
        yield


@contextlib.contextmanager
def _held_signals() -> Iterator[list[int]]:
    """Signals that arrive are put into a list instead of ending this process in the middle of something."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda n, _: received.append(n))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_on_ray(jobs: list[Job], done: Callable[[str, int], None], address: str | None, cpus: float, gpus: float) -> None:
    """All jobs of the stage as Ray tasks, as many at a time as the cluster has room for.

    Raises:
        UserError: Ray is not installed, there is no cluster at the address, or it can never run a cell.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise UserError("launcher is ray, which is not installed; pip install 'doratune[cluster]', or launcher: local") from None
    mine = not ray.is_initialized()
    if mine:
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False, configure_logging=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"address is {address!r}: no Ray cluster there ({str(error).splitlines()[0][:150]})") from None
    try:
        have = ray.cluster_resources()
        for what, wanted in (("CPU", cpus), ("GPU", gpus)):
            if wanted > have.get(what, 0):
                raise UserError(f"cell_{what.lower()}s is {wanted:g}, but the cluster has {have.get(what, 0):g}; ask for less")
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_cell)
        waiting = {task.remote(program(words), log, os.getcwd(), cpus): name for name, words, log in jobs}
        while waiting:
            (ready, *_), _ = ray.wait(list(waiting), num_returns=1)
            try:
                status = ray.get(ready)
            except ray.exceptions.RayError:  # its worker died, of memory or with its node: this cell alone failed
                status = -9
            done(waiting.pop(ready), status)
    finally:
        if mine:
            ray.shutdown()


def _cell(words: list[str], log: str, folder: str, cpus: float) -> int:
    """One cell, on a worker of the cluster."""
    os.makedirs(os.path.dirname(os.path.join(folder, log)), exist_ok=True)
    threads = {"OMP_NUM_THREADS": str(max(1, int(cpus)))}
    with open(os.path.join(folder, log), "a", encoding="utf-8") as file:
        return subprocess.run(words, cwd=folder, stdout=file, stderr=subprocess.STDOUT, env=os.environ | threads).returncode
