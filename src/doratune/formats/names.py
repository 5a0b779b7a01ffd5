"""Module names: what files put in front of them, and the names of a model that they mean.

    unet.down_blocks.0.…          diffusers and ai-toolkit: a pipeline's component, then the name
    lora_unet_down_blocks_0_…     kohya: a component, then the name with underscores, which only the model's own names undo
    diffusion_model.…             the network that denoises, whatever it is called

Cost: a walk over the model's modules.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..errors import UserError, listed, near_misses
from ..layers import kind_of
from ..layers.layouts import named_layers
from .spellings import spellings

DOTTED = {
    "unet.": "unet", "transformer.": "transformer", "text_encoder_3.": "text_encoder_3", "text_encoder_2.": "text_encoder_2",
    "text_encoder.": "text_encoder", "model.diffusion_model.": None, "diffusion_model.": None, "base_model.model.": None,
}  # fmt: skip
FLAT = {
    "lora_unet_": "unet", "lora_transformer_": "transformer", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3", "lora_te_": "text_encoder", "lycoris_": None,
}  # fmt: skip
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass
class ModelNames:
    """What conversions ask of a model: its layers' shapes, its configuration."""

    shapes: dict[str, tuple[int, ...]]
    """(O, I) by module, as the maths sees it."""
    kernels: dict[str, tuple[int, ...]]
    """(I / groups, k…) of convolutions."""
    groups: dict[str, int]
    embeddings: set[str]
    config: object | None

    @classmethod
    def of(cls, model: nn.Module) -> ModelNames:
        shapes, kernels, groups, embeddings = {}, {}, {}, set()
        for name, module in named_layers(model):
            kind = kind_of(module) if name else None
            base = kind.base(module) if kind is not None else None
            if base is None:
                continue
            shapes[name] = tuple(base.shape(module))
            if hasattr(module, "padding_mode"):
                kernels[name], groups[name] = tuple(module.weight.shape[1:]), module.groups
            if isinstance(module, nn.Embedding):
                embeddings.add(name)
        return cls(shapes, kernels, groups, embeddings, getattr(model, "config", None))

    def setting(self, name: str, default=None):
        """A value of its configuration, the text model's where it has one of its own."""
        config = self.config
        inner = getattr(config, "text_config", None)
        value = getattr(inner, name, None) if inner is not None else None
        return getattr(config, name, default) if value is None else value


def component_of(spelled: str) -> tuple[str | None, str, bool]:
    """(component, rest of the name, has it underscores?) of a module's name in a file."""
    for prefix, component in FLAT.items():
        if spelled.startswith(prefix):
            return component, spelled.removeprefix(prefix), True
    for prefix, component in DOTTED.items():
        if spelled.startswith(prefix):
            return component, spelled.removeprefix(prefix), False
    return None, spelled, False


def resolved(spelled: list[str], where: str, model: ModelNames | None, component: str | None) -> tuple[dict[str, str], str | None]:
    """({name in the file: module of the model}, component) for one component of the file.

    Without a model, names stay as they are but for what is in front. With one, the component is taken whose names it has.

    Raises:
        UserError: names of two programs, names with underscores and no model, several components and none chosen, names that the
            model has not.
    """
    groups: dict[str | None, dict[str, str]] = {}
    flat = set()
    for name in spelled:
        owner, rest, underscores = component_of(name)
        groups.setdefault(owner, {})[name] = rest
        flat |= {name} if underscores else set()
    if flat and len(flat) < len(spelled):
        dotted = next(name for name in spelled if name not in flat)
        raise UserError(f"{where} mixes names of two programs: {sorted(flat)[0]} with underscores, {dotted} with dots")
    if component is not None and component not in groups and None not in groups:
        raise UserError(f"{where} has no component {component!r}; it has {listed(sorted(filter(None, groups)))}")
    if component in groups and component is not None:
        groups = {component: groups[component]}
    if model is None:
        if flat:
            raise UserError(
                f"{where} names modules with underscores ({sorted(flat)[0]}), which only the model's own names undo; give the model"
            )
        if len(groups) > 1:
            parts = listed(sorted(str(name) for name in groups))
            raise UserError(f"{where} holds adapters of several components ({parts}); say which with component")
        owner, names = next(iter(groups.items()))
    else:
        owner, names = _of_model(groups, flat, where, model)
    first: dict[str, str] = {}
    for spelled_name, name in names.items():
        if first.setdefault(name, spelled_name) != spelled_name:
            raise UserError(f"{where}: {first[name]} and {spelled_name} are the same module, {name}")
    return names, owner or component


def _of_model(groups, flat, where: str, model: ModelNames) -> tuple[str | None, dict[str, str]]:
    """(component, {name in the file: module}) of the component whose names the model has."""
    others = {other: name for other, name in spellings(model.shapes, model.config).items() if other not in model.shapes}
    known = {name: name for name in model.shapes} | others
    by_underscores: dict[str, list[str]] = {}
    for spelled, name in known.items():
        by_underscores.setdefault(spelled.replace(".", "_"), []).append(name)

    def meant(name: str, rest: str) -> list[str]:
        if name in flat:
            return by_underscores.get(rest, [])
        return [known[n] for n in (rest, name) if n in known][:1]

    fits = {owner: {name: meant(name, rest) for name, rest in names.items()} for owner, names in groups.items()}
    owner = max(fits, key=lambda one: sum(map(bool, fits[one].values())))
    modules = fits[owner]
    if unknown := [name for name, fit in modules.items() if not fit]:
        hints = {name: near_misses(groups[owner][name], model.shapes, 1) for name in unknown[:2]}
        shown = [name + hints.get(name, "") for name in unknown]
        fitting = f"{len(modules) - len(unknown)} of {len(modules)} fit"
        raise UserError(f"{where}: the model has no module for {listed(shown, 12)} ({fitting})")
    if doubtful := next((name for name, fit in modules.items() if len(fit) > 1), None):
        raise UserError(f"{where}: {doubtful} can mean {listed(modules[doubtful])}; the underscores leave it open")
    return owner, {name: fit[0] for name, fit in modules.items()}
