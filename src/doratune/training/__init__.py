"""Training on transformers.Trainer and accelerate: recipe → data → Trainer with our mixin → adapter."""


def __getattr__(name: str):
    if name == "TrainerMixin":
        from .trainer import TrainerMixin

        return TrainerMixin
    raise AttributeError(f"module 'doratune.training' has no attribute {name!r}")
