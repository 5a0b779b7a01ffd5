"""doratune: DoRA (Weight-Decomposed Low-Rank Adaptation, Liu et al., ICML 2024) at LoRA's price.

The public names, loaded on first use: `import doratune` costs nothing beyond torch itself, and the command line's
`--help` not even that.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "AdapterConfig": "config",
    "UserError": "errors",
    "attach": "adapter.attach",
    "detach": "adapter.attach",
    "adapters": "adapter.attach",
    "names": "adapter.several",
    "use": "adapter.several",
    "delete": "adapter.several",
    "combine": "adapter.combine",
    "strength": "adapter.combine",
    "disabled": "adapter.routes",
    "mixed": "adapter.routes",
    "parameter_groups": "adapter.groups",
    "refresh": "adapter.attach",
    "inspect": "adapter.inspect",
    "verify": "adapter.verify",
    "merge": "adapter.merge",
    "unmerge": "adapter.merge",
    "merged_state_dict": "adapter.merged_state",
    "as_peft": "training.peft_view",
    "save": "checkpoint",
    "load": "checkpoint",
}
_PACKAGES = (
    *("analysis", "baselines", "bases", "bench", "checkpoint", "comparison", "data", "directions", "evaluation", "export"),
    *("formats", "generation", "layers", "math", "peft", "report", "training"),
)
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name in _PACKAGES:
        return import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module 'doratune' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
    return value


def __dir__():
    return sorted([*globals(), *__all__, *_PACKAGES])
