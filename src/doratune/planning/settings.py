"""PlanSettings: the settings of a training run, and of the devices that it is planned for."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Literal

from ..support.devices import Device
from ..support.values import number
from ..training.recipe import TrainRecipe, check_share

PROCESS_GIB = {"cuda": 0.5, "cpu": 0.66}
"""What a process takes before it has a tensor. cpu: Python, PyTorch and transformers as `doratune train` loads them, measured
(docs/planning.md). cuda: a context and the workspaces of cuBLAS, as is usual; not measured here."""


@dataclass(kw_only=True)
class PlanSettings(TrainRecipe):
    """Memory that a training run will need, term by term; whether it fits; the largest batch or rank; its time; no weights read.

    Args:
        memory: of each device, in GiB; 0: of this machine's, where it has one
        answer_length: positions with a loss in the longest example; default: max_length. Training keeps logits of these only
        largest: also find the largest batch_size or rank that fits; none: do not
        image_count: of a model of images and text: images in the longest example; their tokens are a part of max_length
        image_size: side of the images in pixels, before the model's image processor; default: a photograph of 640 x 480
        classes: of images or pixels, where the model gets a new head; default: those of its own head
        tokens: in the data, without padding; of image models: images; for the time of a run without max_steps
        tokens_per_second: measured on one device (metrics.json of a run has it); of image models: images; for the time
        tflops: or: 10^12 operations a second that a device reaches in a step, for the time; a guess, not a measure
        process: GiB that a process takes before it has a tensor; default: 0.5 on cuda, 0.66 on cpu
    """

    device: Device = "cuda"
    memory: float = number(24.0, least=0)
    answer_length: int | None = number(None, least=1)
    largest: Literal["batch_size", "rank", "none"] = "batch_size"
    image_count: int = number(1, least=0, most=1000)
    image_size: int | None = number(None, least=1, most=100_000)
    classes: int | None = number(None, least=2, most=1_000_000)
    tokens: int | None = number(None, least=1, most=10**15)
    tokens_per_second: float | None = number(None, above=0)
    tflops: float | None = number(None, above=0)
    process: float | None = number(None, least=0)

    def check(self) -> None:
        """`TrainRecipe.check`; a plan needs no data."""
        super(PlanSettings, dataclasses.replace(self, data=self.data or "any")).check()
        check_share(self.batch_size, self.processes)

    @property
    def process_bytes(self) -> int:
        return int(2**30 * (PROCESS_GIB["cuda" if self.on_gpu else "cpu"] if self.process is None else self.process))

    @property
    def on_gpu(self) -> bool:
        """Is the run planned for a GPU? There the optimizer steps all parameters at once, which takes more memory."""
        return self.device != "cpu"


def _arguments(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__).partition("\nArgs:\n")[2]


PlanSettings.__doc__ = f"{inspect.cleandoc(PlanSettings.__doc__)}\n{_arguments(TrainRecipe)}"
