"""Tiny image models as folders, with the image processor that belongs to each, and photographs of plain colours."""

import numpy as np
import torch
import transformers
from PIL import Image

COLOURS = {"blue": (20, 20, 230), "green": (10, 220, 10), "red": (230, 20, 10)}
KINDS = ("vit", "resnet", "convnext", "swin")
SIDE = 16


def image_model(kind, folder, body=False, **config):
    """A model folder; `body`: without a head, as many pretrained ones are."""
    torch.manual_seed(0)
    square, shortest = {"size": {"height": SIDE, "width": SIDE}}, {"size": {"shortest_edge": SIDE}, "crop_pct": 1.0}
    if kind == "vit":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        classes = transformers.ViTConfig, transformers.ViTModel, transformers.ViTForImageClassification
        own, processor = sizes | {"image_size": SIDE, "patch_size": 4}, transformers.ViTImageProcessorPil(**square)
    elif kind == "resnet":
        classes = transformers.ResNetConfig, transformers.ResNetModel, transformers.ResNetForImageClassification
        own = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
        processor = transformers.ConvNextImageProcessorPil(**shortest)
    elif kind == "convnext":
        classes = transformers.ConvNextConfig, transformers.ConvNextModel, transformers.ConvNextForImageClassification
        own = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
        processor = transformers.ConvNextImageProcessorPil(**shortest)
    else:
        classes = transformers.SwinConfig, transformers.SwinModel, transformers.SwinForImageClassification
        own = {"image_size": SIDE, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
        processor = transformers.ViTImageProcessorPil(**square)
    model = classes[1 if body else 2](classes[0](**own | config))
    for module in model.modules():  # statistics of a pretraining
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def photographs(folder, count=12, colours=COLOURS, size=(20, 24)):
    """folder/COLOUR/N.png, noisy."""
    generator = np.random.default_rng(0)
    for label, colour in colours.items():
        (folder / label).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = np.clip(np.array(colour) + generator.integers(-20, 20, (*size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i}.png")
    return folder


def words(model, data, output, **settings):
    """The words of a short `doratune train`."""
    usual = {"objective": "image_classification", "model": model, "data": data, "output": output, "targets": "all-layers"}
    usual |= {"rank": 2, "lr": 5e-3, "batch_size": 8, "dtype": "float32", "tensorboard": "false", "log_steps": 1}
    return ["train", *(f"--{name}={value}" for name, value in (usual | settings).items())]
