"""Adapted layers: layer kinds, the adapted weight, its factors prepared once per change.

`kind_of(module)` is the one place that knows the kinds; a new one is one new file with a subclass of `kind.LayerKind`.

    kind.py        what every kind offers
    linear.py      nn.Linear and quantized linear layers
    conv1d.py      transformers' Conv1D
    conv.py        convolutions
    embedding.py   embeddings
    attention.py   nn.MultiheadAttention: the packed projections
    experts.py     batched expert weights of mixture-of-experts models
    parts.py       an expert as a layer of its own
    layouts.py     names of layers that are no module of their own
    wrappers.py    what torch.compile and the like put around modules, and the names without it
    adapted.py     an adapted layer: a subclass made on demand
    magnitude.py   names of the parameters behind m
    weight.py      an adapted weight, and how a call of it runs
    frozen.py      its frozen weight W, as the maths asks for it
    prepared.py    the factors of calls, prepared for all weights together
    registry.py    the weights of one attachment, and when their factors are old
    watch.py       hooks that tell it when a forward of the model begins and ends
    fingerprint.py   a hash of all parameters, in a few operations
    shares.py      weights that are whole only while they run: w², whole tensors of one layer
    fsdp.py        of those, FSDP2's shards
    zero3.py       of those, parts of DeepSpeed's ZeRO-3
    offload.py     and what accelerate offloads
    tensor_parallel.py   layers of which each process computes a part
    passes.py      which kernels compute the passes over an output
    fastpath.py    PyTorch's fast paths around layers, closed while adapted
"""

from torch import nn

from ..bases import Base
from .attention import AttentionKind
from .conv import ConvKind
from .conv1d import Conv1DKind
from .embedding import EmbeddingKind
from .experts import ExpertsKind, TransposedExpertsKind
from .kind import LayerKind
from .linear import LinearKind

KINDS = (LinearKind(), Conv1DKind(), ConvKind(), EmbeddingKind(), AttentionKind(), ExpertsKind(), TransposedExpertsKind())


def kind_of(module: nn.Module) -> LayerKind | None:
    """The layer kind that adapts this module, or None."""
    return next((kind for kind in KINDS if kind.matches(module)), None)


def stored_in(module: nn.Module) -> Base | None:
    """How the weight of this module is stored; None where it has none that could be adapted."""
    kind = kind_of(module)
    return None if kind is None else kind.base(module)


def kind_named(name: str) -> LayerKind:
    return next(kind for kind in KINDS if kind.name == name)
