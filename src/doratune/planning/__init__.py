"""doratune plan and init: the memory of a training run before it runs, from a model's config alone, and a recipe that fits.

settings.py        the settings of a run, and of the devices
configs.py         the config that a plan begins with
architecture.py    a model of a config without memory, as a recipe adapts it
workloads/         what a step works on, one file an objective: model, batch, loss
whole_numbers.py   fake tensors whose whole numbers are real
stand_ins.py       layers that allocate what adapted and quantized ones do
log.py             every allocation of a piece of work, and what it is for
step.py            one training step, traced
heap.py            what an allocator loses
plan.py            the terms, and whether they fit
advice.py          the largest batch or rank; the cheapest change
text.py            a plan as a table
start.py           settings that fit a model, its data and a device, each with its reason
image_start.py     the same for image models
lengths.py         how many examples a data set holds, and how long
commented.py       a recipe as a person reads it
"""

from .plan import MemoryPlan, Planner
from .settings import PlanSettings

__all__ = ["MemoryPlan", "PlanSettings", "Planner"]
