"""Layer kinds: how a module's weight becomes the matrix (O, I) of the maths, and which modules can be adapted.

`kind_of(module)` is the one place that knows the list; a new kind is one new file with a subclass of `kind.LayerKind`.
"""

from torch import nn

from .attention import AttentionKind
from .conv import ConvKind
from .embedding import EmbeddingKind
from .experts import ExpertsKind, TransposedExpertsKind
from .kind import LayerKind
from .linear import Conv1DKind, LinearKind

KINDS = (LinearKind(), Conv1DKind(), ConvKind(), EmbeddingKind(), AttentionKind(), ExpertsKind(), TransposedExpertsKind())


def kind_of(module: nn.Module) -> LayerKind | None:
    """The layer kind that adapts this module, or None."""
    return next((kind for kind in KINDS if kind.matches(module)), None)


def kind_named(name: str) -> LayerKind:
    return next(kind for kind in KINDS if kind.name == name)
