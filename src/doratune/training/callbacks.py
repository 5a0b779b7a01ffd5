"""Progress with loss and real tokens a second, and a clean stop on Ctrl-C or SIGTERM."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, ProgressCallback

from ..errors import UserError
from ..support.environment import peak_bytes
from ..support.files import read_json
from ..support.processes import largest


class TokenProgress(ProgressCallback):
    """transformers' bar, with the loss and the padding-free tokens, or the images, a second beside it."""

    def __init__(self, unit: str = "tokens"):
        super().__init__()
        self.unit = unit

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.loss, self.started, self.tokens_before = None, time.perf_counter(), state.num_input_tokens_seen

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.loss = float(logs["loss"])
        if logs and "eval_loss" in logs and self.training_bar is not None:
            accuracy = f", accuracy {100 * logs['eval_accuracy']:.1f} %" if "eval_accuracy" in logs else ""
            self.training_bar.write(f"step {state.global_step}: evaluation loss {float(logs['eval_loss']):.4f}{accuracy}")

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if self.training_bar is not None:
            rate = tokens_per_second(state.num_input_tokens_seen - self.tokens_before, self.started)
            shown = {} if self.loss is None else {"loss": f"{self.loss:.3f}"}
            self.training_bar.set_postfix(shown | {f"{self.unit}/s": f"{rate:.0f}"}, refresh=False)

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


def tokens_per_second(tokens: int, started: float) -> float:
    return tokens / max(time.perf_counter() - started, 1e-9)
