"""An adapter without a format: module → factors, scaling, magnitude and its axis; the same as AdapterConfig, ranks and alphas.

    W' = m ⊙ (W + s·ΔV) / |W + s·ΔV|     (Eq. 5)    ΔV by a direction's own tensors, in the shapes of an adapter folder

Tensors have the names and shapes that `checkpoint/tensors.py` lists: filters of convolutions as filters or flattened, embeddings
transposed. Nothing is copied.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor

from ..config import AdapterConfig
from ..directions import METHODS, direction_of
from ..errors import UserError, listed

EMBEDDING = ("embedding_A", "embedding_B")


@dataclass
class NeutralLayer:
    """One module's share of an adapter."""

    factors: dict[str, Tensor]
    """By parameter: lora_A (R, I…), lora_B (O, R…); embedding_A (R, tokens), embedding_B (dimensions, R); or a direction's own."""
    scaling: float
    """s, which multiplies ΔV."""
    magnitude: Tensor | None = None
    """m as a vector; None: none."""
    axis: str = "output"
    magnitude_only: bool = False
    """Are A and B only there because files have them (rank 1, B = 0)?"""

    @property
    def direction(self) -> str:
        names = {name.replace("embedding", "lora") for name in self.factors}
        return next(d.name for method in METHODS if set((d := direction_of(method)).names) == names)

    @property
    def rank(self) -> int:
        """R of its direction."""
        last = next(name for name in ("lora_A", "embedding_A", "hada_w1_b", "lokr_w2_b", "vera_d") if name in self.factors)
        return len(self.factors[last])

    @property
    def alpha(self) -> float:
        return self.scaling * self.rank

    @property
    def embedding(self) -> bool:
        return EMBEDDING[0] in self.factors


@dataclass
class NeutralAdapter:
    """A whole adapter."""

    layers: dict[str, NeutralLayer]
    whole: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of modules that were trained whole, by their names in the model."""
    also_train: tuple[str, ...] = ()
    component: str | None = None
    """unet, text_encoder …, where the file says so."""
    base_model: str | None = None
    dropout: float = 0.0
    shared: dict[str, Tensor] = field(default_factory=dict)
    """What all layers share: VeRA's frozen pair."""
    left_behind: list[str] = field(default_factory=list)
    """Settings that change no output and that a target need not have."""

    @property
    def method(self) -> str:
        """Raises UserError for a file that mixes methods."""
        kinds = {(layer.direction, layer.magnitude is not None) for layer in self.layers.values() if not layer.magnitude_only}
        kinds = kinds or {("lora", True)}
        if len(with_m := {magnitude for _, magnitude in kinds}) > 1:
            bare = [name for name, layer in self.layers.items() if layer.magnitude is None]
            raise UserError(
                f"{len(bare)} of {len(self.layers)} modules have no magnitude ({listed(bare, 4)}) while the others have: "
                "one adapter is DoRA or LoRA, not both"
            )
        if len(kinds) > 1:
            raise UserError(f"modules have different directions ({listed(sorted(d for d, _ in kinds))}); one adapter has one")
        direction, magnitude = next(iter(kinds))[0], with_m.pop()
        return next(name for name, kind in METHODS.items() if tuple(kind) == (direction, magnitude))

    @property
    def axis(self) -> str:
        """Of all magnitudes of linear layers and convolutions. Raises UserError where they differ."""
        axes = {layer.axis for layer in self.layers.values() if layer.magnitude is not None and not layer.embedding}
        if len(axes) > 1:
            by_axis = {a: [n for n, one in self.layers.items() if one.axis == a and not one.embedding] for a in sorted(axes)}
            shown = "; ".join(f"{axis}: {listed(names, 3)}" for axis, names in by_axis.items())
            raise UserError(f"magnitudes on both axes in one adapter ({shown}); one adapter has one axis")
        return axes.pop() if axes else "output"

    def config(self) -> AdapterConfig:
        """As a configuration, modules by their full names; ranks and alphas of single modules are beside it."""
        trained = {name: layer for name, layer in self.layers.items() if not layer.magnitude_only}
        ranks = Counter(layer.rank for layer in trained.values()) or {1: 1}
        alphas = Counter(layer.alpha for layer in trained.values()) or {1.0: 1}
        per_token = {layer.axis == "output" for layer in self.layers.values() if layer.embedding and layer.magnitude is not None}
        if len(per_token) > 1:
            raise UserError("some embeddings have a magnitude per token, others per dimension; one adapter has one kind")
        return AdapterConfig(
            method=self.method,
            rank=max(ranks, key=ranks.get),
            alpha=max(alphas, key=alphas.get),
            dropout=self.dropout,
            targets=tuple(trained),
            magnitude_only=tuple(name for name, layer in self.layers.items() if layer.magnitude_only),
            also_train=self.also_train,
            magnitude_axis=self.axis,
            embedding_magnitude="dimension" if per_token == {False} else "token",
        )

    def ranks(self) -> dict[str, int]:
        return {name: 0 if layer.magnitude_only else layer.rank for name, layer in self.layers.items()}

    def alphas(self) -> dict[str, float]:
        default = self.config().alpha
        return {name: default if layer.magnitude_only else layer.alpha for name, layer in self.layers.items()}

    def tensors(self) -> dict[tuple[str, str], Tensor]:
        """{(module, parameter): tensor}, as an adapter folder is read."""
        tensors = {(name, part): t for name, layer in self.layers.items() for part, t in layer.factors.items()}
        tensors |= {(name, "magnitude"): layer.magnitude for name, layer in self.layers.items() if layer.magnitude is not None}
        return tensors | {("", key): t for key, t in (self.whole | self.shared).items()}
