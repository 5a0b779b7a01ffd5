"""Layer kinds: how a module's weight becomes the matrix (O, I) of the maths, and which modules can be adapted.

`kind_of(module)` is the one place that knows the list; a new kind is one new file with `matches`, `matrix` and `refusal`.
"""

from torch import nn

from . import linear

KINDS = (linear.LINEAR, linear.CONV1D)


def kind_of(module: nn.Module):
    """The layer kind that adapts this module, or None."""
    return next((kind for kind in KINDS if kind.matches(module)), None)
