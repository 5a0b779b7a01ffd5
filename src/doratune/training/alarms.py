"""Warnings of a run: a loss that is 0 or does not fall, an m that does not move, an evaluation that worsens.

Each is said once, with what to look at. Cost: a look at the figures that are logged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import TrainerCallback

from .movement import Movement

LITTLE_MOVED = 1e-4
"""Mean |Δm|/m below which a magnitude has hardly moved: AdamW moves an m of 1 by its learning rate at each step."""
FELL, ENOUGH = 0.01, 20
"""Share by which a loss should fall, and logged losses below which nothing is said of it."""


class Alarms(TrainerCallback):
    """The look-out of one run."""

    def __init__(self, say: Callable[[str], None]):
        self.say, self.said = say, set()
        self.best: tuple[float, int] | None = None
        self.worse = 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        if logs.get("loss") == 0:
            self._once("zero", f"the loss is 0 at step {state.global_step}: nothing is learned; doratune data shows what should be")
        if "eval_loss" in logs:
            self._evaluated(float(logs["eval_loss"]), state.global_step)

    def _evaluated(self, loss: float, step: int) -> None:
        if self.best is None or loss < self.best[0]:
            self.best, self.worse = (loss, step), 0
            return
        self.worse += 1
        if self.worse == 2:
            before = f"{self.best[0]:.4f} at step {self.best[1]}"
            self._once(
                "worse",
                f"the evaluation loss worsens: {before}, {loss:.4f} at step {step}; best_by: loss takes the best checkpoint, "
                "early_stopping: 2 stops",
            )

    def _once(self, kind: str, text: str) -> None:
        if kind not in self.said:
            self.said.add(kind)
            self.say(f"warning: {text}")


def last_warning(moved: Movement | None, log: Sequence[dict], steps: int, lr: float) -> str | None:
    """What there is to warn of at the end of a run; None: nothing.

    Args:
        log: the rows of the log. lr: the rate that the recipe asked for.
    """
    if moved is not None and moved.warning:
        return moved.warning
    losses = [row["loss"] for row in log if "loss" in row]
    if len(losses) >= ENOUGH:
        part = len(losses) // 4
        first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
        if last > first * (1 - FELL):
            fell = f"the loss has not fallen ({first:.4f} at first, {last:.4f} at last)"
            return f"{fell}: look at the data, or try another lr than {lr:g}"
    if moved is not None and moved.magnitude is not None and moved.magnitude < LITTLE_MOVED:
        return f"the magnitude moved {100 * moved.magnitude:.2g} % in {steps} steps at lr {lr:g}: train longer, or raise lr"
    return None
