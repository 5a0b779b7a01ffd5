"""An attached model as trainers know PEFT's: `as_peft(model)` is a `peft.PeftModel` around it, over the same modules and tensors.

TRL's trainers, transformers' Trainer and accelerate ask `isinstance(model, PeftModel)` and then take PEFT's road: the reference of
DPO, KTO, GRPO and RLOO is the same base with a frozen copy of the adapter as it was, no second base; weights go to an engine by
`merge_adapter`; checkpoints hold the adapters. Every such call is answered here by doratune's own functions:

    add_adapter(name)    a frozen copy of the adapter in use      disable_adapter()    the base, bit for bit
    set_adapter(name)    `doratune.use`                           merge_adapter()      `doratune.merge`, and back bit for bit
    save_pretrained, load_adapter    folders as PEFT lays them out: other adapters than `default` in folders of their names

Cost: nothing in a forward but the first in training, which is watched for weights that are read past their layer. A copy of an
adapter has its A, B and m, nothing of W's size.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn

from ..adapter.attach import record_of
from ..adapter.layer import keep_wide
from ..adapter.merge import merge, unmerge
from ..adapter.routes import disabled, mixed
from ..adapter.running import Running, watchable
from ..adapter.several import delete, duplicate, names, record_named, use
from ..adapter.states import refuse_merged
from ..checkpoint import peft
from ..checkpoint.adapter import load, load_weights, save
from ..errors import UserError, listed
from ..layers.wrappers import synchronizing, unwrapped

DEFAULT, BASE = "default", "__base__"
"""PEFT's names of the adapter that is saved at the top of a folder, and of no adapter in a mixed batch."""


def as_peft(model: nn.Module) -> PeftView:
    """The attached model as a `peft.PeftModel`, for TRL's trainers and whatever else asks for one. doratune's functions take it as
    they take the model, which stays what it is.

    Raises:
        UserError: nothing is attached, or the adapter is merged.
    """
    if isinstance(model, PeftView):
        return model
    refuse_merged(record_of(model), "doratune.as_peft")
    return PeftView(unwrapped(model))


class Tuner(nn.Module):
    """`base_model` of the view, as PEFT's own tuners stand between a PeftModel and the model."""

    prefix = "lora_"

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


class Configs(dict):
    """Adapter → its PeftConfig; what trainers call `default` is the adapter in use, whatever its name."""

    def __init__(self, configs: dict[str, PeftConfig], in_use: str | None):
        super().__init__(configs)
        self.in_use = in_use

    def __missing__(self, name):
        if name == DEFAULT and self.in_use is not None:
            return self[self.in_use]
        raise KeyError(name)


class PeftView(PeftModel):
    """See the module."""

    def __init__(self, model: nn.Module):
        nn.Module.__init__(self)
        self.base_model = Tuner(model)
        self.peft_type = "LORA"
        self.special_peft_forward_args = {"adapter_names"}
        self._is_prompt_learning = self._adapters_disabled = self._watched = False
        self.training = model.training

    @property
    def attached(self) -> nn.Module:
        """The model that is looked at."""
        return self.base_model.model

    def get_base_model(self) -> nn.Module:
        return self.attached

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        with self._mixed(adapter_names):
            if self._watched or not self.training or not watchable(self.attached):
                return self.base_model(*args, **kwargs)
            self._watched = True
            with Running(self.attached) as seen:
                result = self.base_model(*args, **kwargs)
        self._refuse_reads(seen.reads)
        return result

    def generate(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        with self._mixed(adapter_names):
            return self.attached.generate(*args, **kwargs)

    def _mixed(self, adapter_names):
        if adapter_names is None:
            return contextlib.nullcontext()
        return mixed(self.attached, [None if name == BASE else name for name in adapter_names])

    @staticmethod
    def _refuse_reads(reads: dict[str, str]) -> None:
        """TRL multiplies by the output head's weight itself: an adapter there would never be trained."""
        if reads:
            shown = listed([f"{name} (by {function})" for name, function in reads.items()], 3)
            raise UserError(f"the weight is read past its layer, so that its adapter does nothing: {shown}; leave it out (exclude)")

    def named_parameters(self, *args, **kwargs):
        """m under PEFT's name of it, by which TRL knows what is not to be put into bf16 over a quantized base."""
        for name, p in super().named_parameters(*args, **kwargs):
            owner, dot, leaf = name.rpartition(".")
            yield f"{owner}{dot}{leaf.replace('magnitude', 'lora_magnitude_vector', 1)}", p

    def get_parameter(self, target: str) -> nn.Parameter:
        return super().get_parameter(target.replace("lora_magnitude_vector", "magnitude"))

    def train(self, mode: bool = True):
        """A, B and m are trained in fp32: TRL puts A and B of a quantized model into bf16."""
        keep_wide(self.attached)
        return super().train(mode)

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        known = names(self.attached)
        return Configs({name: self._config(name) for name in known}, next(iter(known), None))

    def _config(self, name: str) -> PeftConfig:
        """What PEFT's configuration can say of an adapter."""
        record = record_named(self.attached, name)
        config, task = record.config, "CAUSAL_LM" if hasattr(self.attached, "prepare_inputs_for_generation") else None
        if config.direction != "lora":
            return PeftConfig(task_type=task)
        said = peft.describe(config, dict.fromkeys(record.names, config.rank), record.alphas, None)
        known = LoraConfig.__dataclass_fields__
        return LoraConfig(
            **{key: value for key, value in said.items() if key in known} | {"task_type": task, "inference_mode": False}
        )

    @property
    def active_adapter(self) -> str:
        return next(iter(names(self.attached)), DEFAULT)

    @property
    def active_adapters(self) -> list[str]:
        return [self.active_adapter]

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Switch; each adapter stays trainable or frozen, as it was attached or loaded."""
        self._switch(_one(adapter_name))

    def add_adapter(self, adapter_name: str, peft_config=None, **settings) -> None:
        """A frozen copy of the adapter in use, with its values of now: what TRL keeps as reference."""
        if peft_config is not None and peft_config.is_prompt_learning:
            raise UserError("a prompt beside a doratune adapter is not supported; call doratune.merge(model) and go on from there")
        duplicate(self.attached, adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        delete(self.attached, adapter_name)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base in the block; modules that are trained whole are the base's too."""
        name = self.active_adapter
        if not record_of(self.attached).also_train:
            with disabled(self.attached):
                yield
            return
        self._switch(None)
        try:
            yield
        finally:
            use(self.attached, name)

    def _switch(self, name: str | None) -> None:
        """Put another adapter's parameters in place of those in use.

        Raises:
            UserError: they are sharded over processes (FSDP, ZeRO-3), and whoever did it counts on them.
        """
        if self.active_adapter != name and _sharded(self.attached):
            raise UserError(
                "the adapter is sharded over processes, where it cannot be switched: train under DistributedDataParallel, or set "
                "precompute_ref_log_probs=True"
            )
        use(self.attached, name)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """The merged weights in place, for whoever reads them (an engine); `unmerge_adapter` is bit for bit."""
        merge(self.attached, keep="device")

    def unmerge_adapter(self) -> None:
        unmerge(self.attached)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        for name in names(self.attached)[1:]:
            delete(self.attached, name)
        merge(self.attached, keep="none")
        return self.attached

    def unload(self) -> nn.Module:
        for name in names(self.attached):
            delete(self.attached, name)
        return self.attached

    def save_pretrained(self, save_directory, *args, selected_adapters=None, is_main_process: bool = True, **kwargs) -> None:
        """Adapter folders as PEFT lays them out: `default` in the folder, others in folders of their names in it."""
        if not is_main_process:
            return
        in_use = self.active_adapter
        try:
            for name in names(self.attached) if selected_adapters is None else selected_adapters:
                self._switch(name)
                save(self.attached, Path(save_directory) / ("" if name == DEFAULT else name))
        finally:
            use(self.attached, in_use)

    def load_adapter(self, model_id, adapter_name: str, is_trainable: bool = False, **settings) -> None:
        """Values of a folder for an adapter of this name, or one more adapter; the one in use stays in use."""
        in_use = self.active_adapter
        try:
            if adapter_name in names(self.attached):
                self._switch(adapter_name)
                load_weights(self.attached, Path(model_id))
            else:
                load(self.attached, model_id, is_trainable, name=adapter_name)
        finally:
            use(self.attached, in_use)

    def create_or_update_model_card(self, output_dir) -> None:
        """A model card is the trainer's."""


def _sharded(model: nn.Module) -> bool:
    """Does FSDP (either of them) or DeepSpeed hold parts of the parameters?"""
    fsdp2 = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    if synchronizing(model) == "FullyShardedDataParallel" or any(isinstance(module, fsdp2) for module in model.modules()):
        return True
    return any(hasattr(p, mark) for p in model.parameters() for mark in ("ds_id", "_fsdp_flattened"))


def _one(name) -> str:
    if isinstance(name, list | tuple) and len(name) == 1:
        return name[0]
    if not isinstance(name, str):
        raise UserError(f"set_adapter: {name!r}; one adapter is in use at a time: doratune.combine makes one out of several")
    return name
