"""DoRA models of PEFT with this package's maths: same parameters, same files, same results to rounding.

accelerate.py   accelerate, restore, and what they report
layer.py        a layer of PEFT with a forward of ours, and when it goes PEFT's own way
weight.py       an adapted weight whose A, B and m are PEFT's parameters
sources.py      which layers and adapters of PEFT are known, and where their tensors are
merging.py      merged rows without a direction
"""

from .accelerate import Acceleration, accelerate, restore

__all__ = ["Acceleration", "accelerate", "restore"]
