"""doratune: DoRA (Weight-Decomposed Low-Rank Adaptation, Liu et al., ICML 2024) at LoRA's price.

The public names, loaded on first use: `import doratune` costs nothing beyond torch itself, and the command line's
`--help` not even that.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "AdapterConfig": "config",
    "UserError": "errors",
    "attach": "attach",
    "detach": "attach",
    "adapters": "attach",
    "parameter_groups": "attach",
    "refresh": "attach",
    "verify": "verify",
    "merge": "merge",
    "unmerge": "merge",
    "save": "checkpoint",
    "load": "checkpoint",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'doratune' has no attribute {name!r}")
    module = import_module(f".{_HOME[name]}", __name__)
    for public, home in _HOME.items():  # a submodule of the same name (attach, merge) must not hide its function
        if home == _HOME[name]:
            globals()[public] = getattr(module, public)
    return globals()[name]


def __dir__():
    return sorted([*globals(), *__all__])
