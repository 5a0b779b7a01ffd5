"""Prefix tuning: P trained keys and values in front of every attention's own, no reparametrization (as LLM-Adapters runs it).

transformers hands each attention call to a function that it looks up by name. The one registered here puts the prefix in front
of the keys and values (after the cache, without rotary embedding), a block of allowed columns in front of the mask, and calls the
function that the model had. So cache and position ids do not know of the prefix: token positions start at 0 as without it,
and generation, beams, left padding and checkpointing work as they do in the base model. (PEFT 0.21.2 puts the prefix into the
cache instead and therefore refuses gradient checkpointing; there token positions start at P.) Under rotary embeddings the two
are the same family of models: a turn of the keys apart.

Which modules get a prefix, and of which shape, is what a forward of two tokens shows: the modules that call that function.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from .config import BaselineConfig
from .layer import BaselineLayer

IMPLEMENTATIONS = {"sdpa": "doratune-prefix-sdpa", "eager": "doratune-prefix-eager"}
"""Attention implementation of the model → the one with a prefix."""

START = 0.3
"""Standard deviation of the first keys and values. PEFT's is 1: SmolLM2-135M then starts at a loss of 11.6 (base 1.8, here 3.1)."""

_probes: list[dict[int, tuple]] = []
"""While a model is probed: id of an attention module → shapes of its keys and values."""


class Prefixed(BaselineLayer):
    """An attention module that holds a prefix; `_attend` uses it."""

    names = ("prefix_keys", "prefix_values")

    def forward(self, *args, **kwargs):
        name = getattr(getattr(self, "config", None), "_attn_implementation", None)
        if name is not None and name not in IMPLEMENTATIONS.values():
            raise UserError(
                f"attn_implementation was set to {name!r}, which drops the prefix; detach the baseline before setting it"
            )
        return super().forward(*args, **kwargs)

    def __setstate__(self, state):
        super().__setstate__(state)
        _register()  # unpickled in a process of its own


def shapes(model: nn.Module, config: BaselineConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Module → parameter → shape (P, heads, head size), for every attention that the model's forward calls.

    Raises:
        UserError: not a decoder of transformers, or its attention does not go through transformers' attention interface.
    """
    before = switch(model)
    try:
        seen = _probe(model)
    finally:
        switch_back(model, before)
    attentions = {name: seen[id(m)] for name, m in model.named_modules() if id(m) in seen}
    if not attentions:
        raise UserError(
            f"{type(model).__name__} does not call its attention through transformers' interface, so a prefix has no place; "
            "use method series or parallel"
        )
    return {
        name: {"prefix_keys": (config.size, *keys), "prefix_values": (config.size, *values)}
        for name, (keys, values) in attentions.items()
    }


def start(shape: tuple[int, ...], name: str, generator: torch.Generator) -> Tensor:
    """First values, fp32 on the CPU."""
    return START * torch.randn(shape, generator=generator)


def switch(model: nn.Module) -> list[str]:
    """Let the model's attention calls go through `_attend`; returns what they went through before.

    Raises:
        UserError: not a decoder of transformers, or an implementation that takes no mask.
    """
    configs = _configs(model)
    if not configs:
        raise UserError(
            f"{type(model).__name__} is no model of transformers; prefix tuning needs one: use method series or parallel"
        )
    if any(getattr(c, "is_encoder_decoder", False) for c in configs):
        raise UserError(
            f"{type(model).__name__} is an encoder-decoder; prefix tuning is for decoders: use method series or parallel"
        )
    before = [c._attn_implementation_internal for c in configs]
    if any(name in IMPLEMENTATIONS.values() for name in before):
        raise UserError("this model shares its config with a model that has a prefix; build it from a copy of the config")
    if wrong := [name for name in before if name not in (None, *IMPLEMENTATIONS)]:
        raise UserError(f"attn_implementation is {wrong[0]!r}, which takes no prefix; load the model with 'sdpa' or 'eager'")
    _register()
    for c in configs:
        c._attn_implementation_internal = IMPLEMENTATIONS[c._attn_implementation_internal or "sdpa"]
    return before


def switch_back(model: nn.Module, before: list[str]) -> None:
    """Undo `switch`."""
    for c, name in zip(_configs(model), before, strict=True):
        c._attn_implementation_internal = name


def _configs(model: nn.Module) -> list:
    """The transformers configurations that the modules of a model look their attention function up in, each once."""
    configs = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "_attn_implementation_internal")}
    return list(configs.values())


@torch.no_grad()
def _probe(model: nn.Module) -> dict[int, tuple]:
    """id of each attention module that a forward of two tokens calls → ((heads, size) of its keys, of its values)."""
    seen, training = {}, [m for m in model.modules() if m.training]
    _probes.append(seen)
    try:
        model.eval()
        ids = torch.zeros((1, 2), dtype=torch.long, device=next(model.parameters()).device)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except UserError:
        raise
    except Exception as error:  # any model of any family
        reason = (str(error).splitlines() or [""])[0][:200]
        raise UserError(
            f"{type(model).__name__} does not take two tokens ({type(error).__name__}: {reason}); use another method"
        ) from error
    finally:
        _probes.remove(seen)
        for m in training:
            m.training = True
    return seen


def _register() -> None:
    """Make the two implementations known to transformers."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for plain, name in IMPLEMENTATIONS.items():
        ALL_ATTENTION_FUNCTIONS.register(name, {"sdpa": _sdpa, "eager": _eager}[plain])
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, {"sdpa": _sdpa_mask, "eager": _eager_mask}[plain])


def _sdpa(module, *args, **kwargs):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return _attend(ALL_ATTENTION_FUNCTIONS["sdpa"], module, *args, **kwargs)


def _eager(module, *args, **kwargs):
    plain = type(module).plain_class if isinstance(module, BaselineLayer) else type(module)
    function = getattr(sys.modules[plain.__module__], "eager_attention_forward", None)
    if function is None:
        raise UserError(f"{plain.__name__} has no eager attention function; load the model with attn_implementation 'sdpa'")
    return _attend(function, module, *args, **kwargs)


def _sdpa_mask(*args, **kwargs):
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def _eager_mask(*args, **kwargs):
    from transformers.masking_utils import eager_mask

    return eager_mask(*args, **kwargs | {"allow_is_bidirectional_skip": False})


def _attend(function, module, query, key, value, attention_mask, **kwargs):
    """`function` with the module's prefix in front of key and value (B, heads, T, size) and of the mask (B, 1, Q, T)."""
    if _probes or "prefix_keys" in module._parameters:
        if idle := [name for name in ("position_bias", "cache") if kwargs.get(name) is not None]:
            raise UserError(f"{type(module).__name__} attends with a {idle[0]}, where a prefix has no place; use another method")
    if _probes:
        _probes[-1][id(module)] = tuple((t.shape[1], t.shape[3]) for t in (key, value))
    if "prefix_keys" not in module._parameters:
        return function(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is None:
        attention_mask = _mask_of(module, query, key, kwargs.get("is_causal"))
    key, value = _in_front(module.prefix_keys, key), _in_front(module.prefix_values, value)
    allowed = True if attention_mask.dtype == torch.bool else 0.0
    attention_mask = F.pad(attention_mask, (len(module.prefix_keys), 0), value=allowed)
    return function(module, query, key, value, attention_mask, **kwargs)


def _in_front(prefix: Tensor, states: Tensor) -> Tensor:
    """(B, heads, P + T, size)."""
    return torch.cat([prefix.to(states.dtype).transpose(0, 1).expand(len(states), -1, -1, -1), states], dim=2)


def _mask_of(module, query: Tensor, key: Tensor, causal: bool | None) -> Tensor:
    """What a missing mask means: all earlier keys, or all keys."""
    causal = getattr(module, "is_causal", True) if causal is None else causal
    everything = torch.zeros(query.shape[2], key.shape[2], dtype=query.dtype, device=query.device)
    hidden = torch.ones_like(everything, dtype=torch.bool).triu(1 + key.shape[2] - query.shape[2])
    return (everything.masked_fill(hidden, torch.finfo(query.dtype).min) if causal else everything)[None, None]
