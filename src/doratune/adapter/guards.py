"""What the usual calls do on an attached model: `save_pretrained` writes the adapter or refuses, others' adapters are refused.

The classes of transformers, diffusers and others would write the base alone (they know nothing of A, B and m), and PEFT would put
its layers around adapted ones. So an attached model has attributes of its own in front of those methods, from attach to detach or
merge. A copy of the model, or a pickle of it, has its own. Cost: nothing in a forward.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from pathlib import Path

import torch
from torch import nn

from ..errors import UserError
from ..layers.adapted import Adapted, own_parameters
from ..layers.shares import sharded
from ..layers.wrappers import module_at, plain_state
from ..support.files import write_tensors
from .foreign import take_from_between
from .layer import keep_wide, untouched
from .states import base_name

ADDING = ("add_adapter", "load_adapter", "load_lora_adapter")
SAVING = ("save_pretrained", "save")
TAGGING = "add_model_tags"
WEIGHTS = "model.safetensors"
TRAINABLE = "_hf_peft_config_loaded"
"""By this attribute transformers knows a quantized model that has an adapter, and lets a Trainer train it."""


class Refused:
    """A method that is not to be called now."""

    def __init__(self, message: str):
        self.message = message

    def __call__(self, *args, **kwargs):
        raise UserError(self.message)


class OtherAdapters(dict):
    """`peft_config` of an attached model: PEFT puts its configuration there before it puts anything around a layer."""

    def __setitem__(self, name, config):
        raise UserError(_ADDED)

    def update(self, *args, **kwargs):
        raise UserError(_ADDED)


class OfModel:
    """A method that an attached model has for itself; a copy of the model, or a pickle of it, has its own."""

    def __init__(self, model: nn.Module):
        self.model = weakref.ref(model)

    def __deepcopy__(self, memo):
        model = self.model()
        return _of_model(type(self), memo.get(id(model), model), self._own())

    def __reduce__(self):
        return _of_model, (type(self), self.model(), self._own())

    def _own(self) -> dict:
        return {key: value for key, value in vars(self).items() if key != "model"}


def _of_model(cls: type, model: nn.Module, own: dict) -> OfModel:
    """The same method of another model, which need not be whole yet."""
    method = cls.__new__(cls)
    vars(method).update(own, model=weakref.ref(model))
    return method


class AdapterSaved(OfModel):
    """`save_pretrained` of an attached transformers model: the adapter's folder, which `from_pretrained` reads with its base.

    With `state_dict` (a Trainer's checkpoint) also what is trained under the model's own keys, which a Trainer puts back when it
    resumes or takes the best checkpoint."""

    def __call__(self, save_directory, is_main_process: bool = True, push_to_hub: bool = False, **kwargs) -> None:
        from .. import save

        if (model := self.model()) is None:
            raise UserError("the model that this save_pretrained belongs to is gone; call doratune.save(model, folder)")
        if push_to_hub:
            raise UserError("push_to_hub: call save_pretrained without it, and upload the folder")
        if not is_main_process and not sharded(model):
            return
        save(model, save_directory)
        if base_name(model) is None:
            unnamed = "no folder or hub has this base model, so the folder does not name it"
            remedy = "from_pretrained cannot find it, doratune.load(model, folder) can"
            warnings.warn(f"{save_directory}: {unnamed}; {remedy}", stacklevel=2)
        if "state_dict" in kwargs:
            write_tensors(Path(save_directory) / WEIGHTS, _trained(model, kwargs["state_dict"]))


class Tagged(OfModel):
    """`add_model_tags`, which every trainer of TRL calls when it has its reference: a base that it loaded by the model's name knows
    nothing of an adapter that is trained already. What is computed before the first step needs m in fp32, too."""

    def __call__(self, tags):
        if (model := self.model()) is None:
            raise UserError("the model that this add_model_tags belongs to is gone; keep what attach returns")
        keep_wide(model)
        init = sys._getframe(1).f_locals
        reference = getattr(init.get("self"), "ref_model", None)
        if isinstance(reference, nn.Module) and init.get("ref_model") is None and not _any_adapted(reference) and _moved(model):
            trainer = type(init["self"]).__name__
            raise UserError(
                f"the reference of {trainer} would be the base, without the adapter that is trained already; give it "
                "doratune.as_peft(model), or set precompute_ref_log_probs=True where it has that"
            )
        return type(model).add_model_tags(model, tags)


def _any_adapted(model: nn.Module) -> bool:
    return any(isinstance(module, Adapted) for module in model.modules())


@torch.no_grad()
def _moved(model: nn.Module) -> bool:
    """Does the adapter change the base's output?"""
    return not all(untouched(module) for module in model.modules() if isinstance(module, Adapted))


class Around(OfModel):
    """What PEFT asks the model that it stands around, once it does (`_cast_adapter_dtype`): prompts and the like, which put nothing
    into a layer and so meet no other guard. They have frozen the model by then: that is undone."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.trained = frozenset(name for name, p in model.named_parameters() if p.requires_grad)

    def __call__(self, *args, **kwargs):
        model = self.model()
        take_from_between(model)
        for name, p in model.named_parameters():
            if name in self.trained:
                p.requires_grad_(True)
        raise UserError(_ADDED)


def _trained(model: nn.Module, state: dict | None) -> dict[str, torch.Tensor]:
    """What is trained, under the keys of the model's state dict, or under those of one that a wrapper made."""
    record = vars(model)["_doratune"]
    own = {id(p) for module in model.modules() if isinstance(module, Adapted) for p in own_parameters(module).values()}
    own |= {id(t) for name in record.also_train for t in plain_state(module_at(model, name)).values()}
    keys = [key for key, t in model.state_dict(keep_vars=True).items() if id(t) in own]
    state = model.state_dict() if state is None else state
    found = {key: next((k for k in (key, *state) if k in state and (k == key or k.endswith("." + key))), None) for key in keys}
    return {spelled: state[spelled].detach().clone() for spelled in found.values() if spelled is not None}


_ADDED = (
    "this model has a doratune adapter; call doratune.detach(model), or doratune.merge(model) and go on from the merged weights, "
    "before putting another package's adapter on it"
)


def put_on(model: nn.Module) -> None:
    """Stand in front of those methods, on the model and on every part of it with adapted layers that has them."""
    transformers = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ())
    for module in model.modules():
        cls = type(module)
        if module is not model and not (
            hasattr(cls, "save_pretrained") and any(isinstance(inner, Adapted) for inner in module.modules())
        ):
            continue
        saved = AdapterSaved(model) if module is model and isinstance(module, transformers) else None
        for name in SAVING if hasattr(cls, "save_pretrained") else ():
            if callable(getattr(cls, name, None)):
                vars(module)[name] = saved or Refused(
                    f"{name} of {cls.__name__} would write the base model without its adapter; call doratune.save(model, folder), "
                    f"or doratune.merge(model) and then {name}"
                )
        for name in ADDING:
            if callable(getattr(cls, name, None)):
                vars(module)[name] = Refused(_ADDED)
        if "peft_config" not in vars(module):
            vars(module)["peft_config"] = OtherAdapters()
    vars(model)["_cast_adapter_dtype"] = Around(model)
    if callable(getattr(type(model), TAGGING, None)):
        vars(model)[TAGGING] = Tagged(model)
    if getattr(model, "is_quantized", False):
        vars(model)[TRAINABLE] = True


def take_off(model: nn.Module) -> None:
    """Undo `put_on`."""
    for module in model.modules():
        for name in [key for key, value in vars(module).items() if isinstance(value, Refused | OtherAdapters | OfModel)]:
            del vars(module)[name]
    vars(model).pop(TRAINABLE, None)
