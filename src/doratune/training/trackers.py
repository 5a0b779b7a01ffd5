"""Where a run's figures go beside metrics.json: TensorBoard, W&B, MLflow, Trackio, by transformers' own callbacks.

What comes here: a package that is missing or a tracker that cannot begin is one line; one that fails on the way is left out, and
the training goes on; a tracker's run that began here ends here, as finished or as failed, so that the next training of the process
has one of its own. Cost: the trackers' own.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator

from transformers import Trainer, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from ..errors import UserError
from ..support.packages import install_line
from .recipe import TRACKERS, TrainRecipe


def trackers_of(recipe: TrainRecipe) -> list[str]:
    """What TrainingArguments' `report_to` is given.

    Raises:
        UserError: a tracker whose package is not installed.
    """
    wanted = [name for name in TRACKERS if name in recipe.report_to or (name == "tensorboard" and recipe.tensorboard)]
    for name in wanted:
        if importlib.util.find_spec(name) is None:
            off = " or --tensorboard false" if name == "tensorboard" else ""
            raise UserError(f"report_to is {name}, which is not installed; run: {install_line(name)}{off}")
    return wanted


class Tracker(TrainerCallback):
    """A tracker's callback of transformers, by whose events the training cannot fail once it has begun."""

    def __init__(self, name: str, callback: TrainerCallback, say: Callable[[str], None]):
        self.name, self.callback, self.say = name, callback, say
        self.failed = self.own = False

    def pass_on(self, event: str, args, state, control, **kwargs):
        """Let the tracker have an event.

        Raises:
            UserError: it cannot begin.
        """
        if self.failed:
            return
        begins = event == "on_train_begin"
        try:
            self.own = self.own or (begins and not self.running())
            getattr(self.callback, event)(args, state, control, **kwargs)
        except Exception as error:  # each package has types of its own
            self.failed = True
            reason = _reason(error)
            if begins:
                raise UserError(
                    f"report_to is {self.name}, which cannot begin: {reason}; mend what it is told, or leave it out of report_to"
                ) from error
            self.say(f"warning: report_to is {self.name}, which takes no more figures of this run: {reason}")

    def end(self, failed: bool) -> None:
        """End the tracker's run, where it began with this training."""
        if hasattr(self.callback, "_auto_end_run"):  # MLflow's, when it is collected, would end whatever run goes on then
            self.callback._auto_end_run = False
        if not self.own or self.name not in _ENDS:
            return
        self.own = False
        try:
            if self.running():
                _ENDS[self.name](importlib.import_module(self.name), failed)
        except Exception as error:
            self.say(f"warning: report_to is {self.name}, whose run did not end well: {_reason(error)}")

    def running(self) -> bool:
        """Has this process a run of the tracker? TensorBoard has none: a writer a callback."""
        return self.name in _RUNNING and _RUNNING[self.name](importlib.import_module(self.name))


def _passing(event: str):
    def passed(self, args, state, control, **kwargs):
        return self.pass_on(event, args, state, control, **kwargs)

    return passed


for _event in [name for name in vars(TrainerCallback) if name.startswith("on_")]:
    setattr(Tracker, _event, _passing(_event))

_RUNNING: dict[str, Callable] = {
    "wandb": lambda wandb: wandb.run is not None,
    "mlflow": lambda mlflow: mlflow.active_run() is not None,
    "trackio": lambda trackio: trackio.context_vars.current_run.get() is not None,
}

_ENDS: dict[str, Callable] = {
    "wandb": lambda wandb, failed: wandb.finish(exit_code=int(failed)),
    "mlflow": lambda mlflow, failed: mlflow.end_run("FAILED" if failed else "FINISHED"),
    "trackio": lambda trackio, failed: trackio.finish(),
}


def watch_trackers(trainer: Trainer, say: Callable[[str], None]) -> None:
    """Put a `Tracker` around each callback that `report_to` brought."""
    names = {get_reporting_integration_callbacks([name])[0]: name for name in trainer.args.report_to}
    callbacks = trainer.callback_handler.callbacks
    callbacks[:] = [Tracker(names[type(one)], one, say) if type(one) in names else one for one in callbacks]


@contextlib.contextmanager
def ending_trackers(trainer: Trainer) -> Iterator[None]:
    """The trackers' runs end with the block: as failed where it raises."""
    failed = True
    try:
        yield
        failed = False
    finally:
        for one in trainer.callback_handler.callbacks:
            if isinstance(one, Tracker):
                one.end(failed)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no reason told"
    return f"{type(error).__name__}: {text[:400].rstrip('.')}"
