"""Training on transformers.Trainer and accelerate: recipe → data → Trainer with our mixin → adapter.

recipe.py        TrainRecipe: every setting
objectives/      what is learned: text, classes of images and of pixels, a thing in images; one file each
examples.py      its data: read, split, tokenized, counted
dreambooth.py    a few images of one thing, and of its class: settings, prompts, images
latents.py       images as a denoiser reads them
denoising.py     the loss of a text-to-image pipeline
painting.py      images that a pipeline draws in a run: samples, images of a class
image_objective.py   what objectives of images share
image_rows.py    images as a model reads them
visual_rows.py   questions about what is seen, as VL-BART reads them
task_order.py    batches of one task each, by the tasks' sizes
mask_rows.py     images with masks as a model reads them; the loss of pixels
mask_scores.py   IoU, pixel accuracy
class_scores.py   accuracy, balanced accuracy, AUROC
streaming.py     its data, read while the run goes on
packing.py       examples in one row, where the model keeps them apart
train.py         one training run
watching.py      when a run logs, evaluates, saves and stops
trackers.py      TensorBoard, W&B, MLflow, Trackio: begun, told, ended
alarms.py        warnings: a loss or an m that does not move, an evaluation that worsens
samples.py       answers to fixed prompts while it trains
status.py        where a run is; the runs of a folder
result.py        metrics.json, the picture of the loss, the card
plots.py         the loss as a picture
resume.py        what a resumed run may change
folder.py        what a run writes where, and the run that was there before
faults.py        gradients that are not finite, processes that torchrun starts again
checkpoints.py   complete in one act; the newest whole one
visual.py        models of images and text: what of them is trained
methods.py       what is trained: an adapter, a baseline, or all weights
trainer.py       TrainerMixin
peft_view.py     an attached model as TRL and others know PEFT's
sharded.py       a model in shards (FSDP2): the engine, and the optimizer's state
base_blocks.py   whether each process loads its own part of the base, else why not
rng.py           random numbers, for another number of processes
launch.py        several processes of one command: torchrun's launcher
idle.py          adapted layers that do not train, named in the first steps
token_loss.py    evaluation loss over tokens
half.py          a scaled loss over an fp16 base
callbacks.py     progress, clean stop on a signal
movement.py      how far m and the direction moved, in one line
"""


def __getattr__(name: str):
    if name == "TrainerMixin":
        from .trainer import TrainerMixin

        return TrainerMixin
    raise AttributeError(f"module 'doratune.training' has no attribute {name!r}")
