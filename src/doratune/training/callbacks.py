"""Progress with loss and real tokens a second, and a clean stop on Ctrl-C or SIGTERM."""

from __future__ import annotations

import signal
import time

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from ..environment import peak_bytes


class TokenProgress(ProgressCallback):
    """transformers' bar, with the loss and the padding-free tokens a second beside it."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.loss, self.started, self.tokens_before = None, time.perf_counter(), state.num_input_tokens_seen

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.loss = float(logs["loss"])
        if logs and "eval_loss" in logs and self.training_bar is not None:
            self.training_bar.write(f"step {state.global_step}: evaluation loss {float(logs['eval_loss']):.4f}")

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if self.training_bar is not None:
            rate = tokens_per_second(state.num_input_tokens_seen - self.tokens_before, self.started)
            shown = {} if self.loss is None else {"loss": f"{self.loss:.3f}"}
            self.training_bar.set_postfix(shown | {"tokens/s": f"{rate:.0f}"}, refresh=False)

    def close(self):
        """Take the bar off the screen when training ends by an error, so that the error stands on a line of its own."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None


class Clock(TrainerCallback):
    """Seconds, CPU seconds, peak memory and real tokens of this process's part of the training."""

    seconds, cpu_seconds, peak_bytes, tokens = 0.0, 0.0, 0, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.tokens_before = time.perf_counter(), state.num_input_tokens_seen
        self.cpu_started = time.process_time()

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds, self.cpu_seconds = time.perf_counter() - self.started, time.process_time() - self.cpu_started
        self.peak_bytes = peak_bytes()
        self.tokens = state.num_input_tokens_seen - self.tokens_before


class StopOnSignal(TrainerCallback):
    """First signal: finish the step, write a checkpoint, stop. Second signal: stop at once."""

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
        if self.received is not None:
            control.should_save = control.should_training_stop = True
        return control


def tokens_per_second(tokens: int, started: float) -> float:
    return tokens / max(time.perf_counter() - started, 1e-9)
