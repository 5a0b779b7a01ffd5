"""Training on transformers.Trainer and accelerate: recipe → data → Trainer with our mixin → adapter.

recipe.py      TrainRecipe: every setting
train.py       one training run
methods.py     what is trained: an adapter, a baseline, or all weights
trainer.py     TrainerMixin
idle.py        adapted layers that do not train, named in the first steps
callbacks.py   progress, clean stop on a signal
movement.py    how far m and the direction moved, in one line
"""


def __getattr__(name: str):
    if name == "TrainerMixin":
        from .trainer import TrainerMixin

        return TrainerMixin
    raise AttributeError(f"module 'doratune.training' has no attribute {name!r}")
