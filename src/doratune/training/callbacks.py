"""One line of progress, the time that a run takes, and a clean stop on Ctrl-C or SIGTERM."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, ProgressCallback

from ..errors import UserError
from ..support.environment import peak_bytes
from ..support.files import read_json
from ..support.processes import largest


class TokenProgress(ProgressCallback):
    """transformers' bar with the time left, and beside it the last logged loss, learning rate, gradient norm and |Δm|, tokens a
    second without padding, or images a second, and the peak of memory."""

    def __init__(self, unit: str = "tokens"):
        super().__init__()
        self.unit = unit

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.logged, self.started, self.tokens_before = {}, time.perf_counter(), state.num_input_tokens_seen

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or not logs:
            return
        if "loss" in logs:
            figures = {"loss": "loss", "lr": "learning_rate", "|g|": "grad_norm"}
            self.logged = {short: f"{float(logs[name]):.3g}" for short, name in figures.items() if name in logs}
            if "magnitude_moved" in logs:
                self.logged["|Δm|"] = f"{100 * logs['magnitude_moved']:.2g} %"
        if "eval_loss" in logs:
            shares = {"eval_token_accuracy": "of tokens", "eval_accuracy": "right"}
            right = "".join(f", {100 * logs[name]:.1f} % {what}" for name, what in shares.items() if name in logs)
            self.training_bar.write(f"step {state.global_step}: evaluation loss {float(logs['eval_loss']):.4f}{right}")

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if self.training_bar is not None:
            rate = tokens_per_second(state.num_input_tokens_seen - self.tokens_before, self.started)
            shown = self.logged | {f"{self.unit}/s": f"{rate:.0f}", "GiB": f"{peak_bytes() / 2**30:.2f}"}
            self.training_bar.set_postfix(shown, refresh=False)

    def close(self):
        """Take the bar off the screen when training ends by an error, so that the error stands on a line of its own."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None


class Clock(TrainerCallback, ExportableState):
    """Seconds, CPU seconds, real tokens and peak memory of the training, over all parts of a run that was resumed: the state
    file of each checkpoint takes along what was spent until then."""

    started: float | None = None

    def __init__(self, checkpoint: Path | None = None):
        self.spent, self.peak_bytes = {"seconds": 0.0, "cpu_seconds": 0.0, "tokens": 0}, 0
        with contextlib.suppress(UserError, KeyError, TypeError):
            if checkpoint is not None:
                state = read_json(checkpoint / "trainer_state.json", "a checkpoint needs it")
                before = state["stateful_callbacks"][type(self).__name__]["attributes"]
                self.spent, self.peak_bytes = {key: before["spent"][key] for key in self.spent}, before["peak_bytes"]
        self.before = dict(self.spent)

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.cpu_started = time.perf_counter(), time.process_time()
        self.run, self.tokens_before = state, state.num_input_tokens_seen

    def state(self) -> dict:
        """What a checkpoint takes along; transformers asks while it writes one."""
        if self.started is not None:
            self._read(self.run)
        return {"args": {}, "attributes": {"spent": self.spent, "peak_bytes": self.peak_bytes}}

    def _read(self, state) -> None:
        now = time.perf_counter() - self.started, time.process_time() - self.cpu_started
        part = dict(zip(self.spent, (*now, state.num_input_tokens_seen - self.tokens_before), strict=True))
        self.spent = {key: self.before[key] + part[key] for key in part}
        self.peak_bytes = max(self.peak_bytes, peak_bytes())

    def on_train_end(self, args, state, control, **kwargs):
        self._read(state)


class StopOnSignal(TrainerCallback):
    """First signal: finish the step, write a checkpoint, stop. Second signal: stop at once.

    Several processes hear of a signal in different steps; they stop after the same one."""

    def __init__(self):
        self.received: int | None = None
        self.previous = {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number, _frame):
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    def on_step_end(self, args, state, control, **kwargs):
        self.received = largest(self.received or 0, args.device) or None
        if self.received is not None:
            control.should_save = control.should_training_stop = True
        return control


def beside_the_bar(say: Callable[[str], None]) -> Callable[[str], None]:
    """`say` while a bar is on the screen: the bar is taken away for the line, so that the line stands by itself."""

    def said(line: str) -> None:
        with tqdm.external_write_mode():
            say(line)

    return said


def tokens_per_second(tokens: int, started: float) -> float:
    return tokens / max(time.perf_counter() - started, 1e-9)


class EpochOrder(TrainerCallback):
    """Tells the sampler its epoch. accelerate looks for it below two wrappers, and the epoch in which several processes are resumed
    has three: its order would be the first epoch's."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        sampler = getattr(train_dataloader, "batch_sampler", None)
        while sampler is not None:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(int(state.epoch or 0))
            sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)
