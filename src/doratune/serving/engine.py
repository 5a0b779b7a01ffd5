"""The thread that writes answers: one batch, rows of all adapters, first come, first served.

    submit   answers to be written; refused where too many wait        give_up   nobody waits for them any more
    stop     ends the thread; what is not finished fails

A client's answers go through `Job.say`, called in this thread. An error in a pass fails its rows; the thread goes on.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import deque

from ..errors import UserError
from ..generation.adapters import NamedAdapters
from .batch import Batch, Job, opened

PROMPT_TOKENS = 2048
"""Of prompts that are read in one pass, padding included; a longer one is read alone."""


class QueueFull(Exception):
    """Too many answers wait."""


class EngineEnded(Exception):
    """No answers are written any more."""


class Engine:
    """Writes the answers of one model.

    Args:
        rows: answers that are written at the same time.
        most_waiting: answers that may wait for a row.
    """

    def __init__(self, adapters: NamedAdapters, rows: int, most_waiting: int):
        self.adapters, self.rows, self.most_waiting = adapters, rows, most_waiting
        self.waiting: deque[Job] = deque()
        self.running = 0
        self.changed = threading.Condition()
        self.stopping = False
        self.problem: BaseException | None = None
        self.ready = threading.Event()
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin, and wait until the batch is open.

        Raises:
            UserError: see `batch.opened`.
        """
        self.thread.start()
        while not self.ready.wait(0.2):  # hears Ctrl-C
            pass
        if self.problem is not None:
            raise self.problem

    def submit(self, jobs: list[Job]) -> None:
        """Put answers behind those that wait, all or none.

        Raises:
            QueueFull: there is no room for them.
            EngineEnded: the server ends, or the thread failed.
        """
        with self.changed:
            if self.stopping:
                raise EngineEnded
            if len(self.waiting) + len(jobs) > self.most_waiting + self.free:
                raise QueueFull
            self.waiting.extend(jobs)
            self.changed.notify()

    @property
    def free(self) -> int:
        return self.rows - self.running

    @property
    def alive(self) -> bool:
        return self.thread.is_alive()

    def give_up(self, jobs: list[Job]) -> None:
        """Nobody waits for these any more: the rows end with the present step."""
        with self.changed:
            for job in jobs:
                job.gone = True
            self.waiting = deque(job for job in self.waiting if not job.gone)

    def stop(self, wait_s: float = 10.0) -> None:
        """End after the present step."""
        with self.changed:
            self.stopping = True
            self.changed.notify()
        self.thread.join(wait_s)

    def _run(self) -> None:
        try:
            with opened(self.adapters) as batch:
                self.ready.set()
                try:
                    while self._wait(batch):
                        self._advance(batch)
                finally:
                    self._end(batch.jobs)
        except UserError as error:
            self.problem = error
        except BaseException as error:
            self.problem = error
            traceback.print_exc(file=sys.stderr)
        finally:
            self.ready.set()

    def _end(self, running: list[Job]) -> None:
        """What is not finished fails, and nothing comes any more."""
        with self.changed:
            self.stopping = True
            left, self.running = [*running, *self.waiting], 0
            self.waiting.clear()
        for job in left:
            if not job.finish:
                job.fail("the server ends")

    def _wait(self, batch: Batch) -> bool:
        """Until there is something to write; False: the end."""
        batch.drop()
        with self.changed:
            self.running = len(batch.jobs)
            while not (self.stopping or self.waiting or batch.jobs):
                self.changed.wait()
        return not self.stopping

    def _advance(self, batch: Batch) -> None:
        """Prompts that there is room for, in one pass, then one token of each row."""
        if jobs := self._next(batch):
            self._admit(batch, jobs)
        if batch.jobs:
            self._guarded(batch, list(batch.jobs), batch.step)

    def _next(self, batch: Batch) -> list[Job]:
        """The answers whose prompts are read together next."""
        jobs: list[Job] = []
        with self.changed:
            while self.waiting and len(batch.jobs) + len(jobs) < self.rows:
                longest = max(len(job.ids) for job in (*jobs, self.waiting[0]))
                if jobs and longest * (len(jobs) + 1) > PROMPT_TOKENS:
                    break
                jobs.append(self.waiting.popleft())
            self.running = len(batch.jobs) + len(jobs)
        return jobs

    def _admit(self, batch: Batch, jobs: list[Job]) -> None:
        """Prompts in one pass; where that fails, each alone, so that one that cannot be read takes no other along."""
        if len(jobs) > 1:
            try:
                batch.admit(jobs)
                return
            except Exception:  # whatever a model raises
                jobs = [job for job in jobs if not (job.tokens or job.finish)]
        for job in jobs:
            self._guarded(batch, [job], lambda job=job: batch.admit([job]))

    def _guarded(self, batch: Batch, jobs: list[Job], run) -> None:
        try:
            run()
        except Exception as error:  # these rows fail, the others go on
            traceback.print_exc(file=sys.stderr)
            batch.fail(jobs, f"the model failed: {' '.join(str(error).split())[:200] or type(error).__name__}")
        time.sleep(0)  # the event loop's turn
