"""Tiny models of semantic segmentation as folders, each with an image processor, and photographs with masks."""

import numpy as np
import torch
import transformers
from PIL import Image

KINDS = ("segformer", "mobilevit", "beit", "upernet")
NAMES = ("ground", "sky", "sun")
SIDE = 32
_SQUARE = {"size": {"height": SIDE, "width": SIDE}}


def mask_model(kind, folder, body=False, **config):
    """A model folder; `body`: without a head for masks, as a pretrained SegFormer or MobileViT has a classifier's."""
    torch.manual_seed(0)
    if kind == "segformer":
        own = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16], "patch_sizes": [3, 3]}
        own |= {"strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16}
        family, processor = "Segformer", transformers.SegformerImageProcessorPil(**_SQUARE)
    elif kind == "mobilevit":  # its processor cuts the middle out of a larger image
        own = {"image_size": SIDE, "hidden_sizes": [8, 12, 16], "neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 8]}
        own |= {"num_attention_heads": 2, "aspp_out_channels": 8, "output_stride": 8, "atrous_rates": [1, 2, 3]}
        crop = {"size": {"shortest_edge": SIDE + 4}, "crop_size": {"height": SIDE, "width": SIDE}}
        family, processor = "MobileViT", transformers.MobileViTImageProcessorPil(**crop)
    elif kind == "beit":  # with an auxiliary head
        own = {"image_size": SIDE, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
        own |= {"intermediate_size": 24, "out_indices": [1, 2, 3, 4], "auxiliary_channels": 8, "pool_scales": [1, 2]}
        family, processor = "Beit", transformers.BeitImageProcessorPil(do_center_crop=False, **_SQUARE)
    else:  # over a ResNet, with an auxiliary head
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
        backbone = transformers.ResNetConfig(**sizes, out_features=["stage1", "stage2", "stage3", "stage4"])
        own = {"backbone_config": backbone, "hidden_size": 16, "auxiliary_channels": 8, "auxiliary_in_channels": 16}
        own |= {"pool_scales": [1, 2]}
        family, processor = "UperNet", transformers.SegformerImageProcessorPil(**_SQUARE)
    what = "ForImageClassification" if body else "ForSemanticSegmentation"
    model = getattr(transformers, family + what)(getattr(transformers, f"{family}Config")(**own | config))
    for module in model.modules():  # statistics of a pretraining: without them nothing comes through so many narrow layers
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(pixel_values=torch.randn(4, 3, SIDE, SIDE))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def labels(*names):
    """Settings of a config whose head has these labels."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def scene(seed, size=(40, 52)):
    """(pixels (H, W, 3), class numbers (H, W)): ground below, sky above it, a sun in the sky."""
    generator = np.random.default_rng(seed)
    numbers = np.ones(size, np.uint8)
    numbers[int(size[0] * generator.uniform(0.5, 0.8)) :] = 0
    top, left = (int(generator.uniform(0.05, 0.4) * n) for n in size)
    numbers[top : top + 8, left : left + 8][numbers[top : top + 8, left : left + 8] == 1] = 2
    colours = np.array([(40, 160, 40), (60, 90, 220), (240, 220, 30)])
    pixels = np.clip(colours[numbers] + generator.integers(-20, 20, (*size, 3)), 0, 255)
    return pixels.astype(np.uint8), numbers


def scenes(folder, count=12, sizes=((40, 52), (36, 36)), first=0):
    """folder/images/N.png, folder/masks/N.png."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels, numbers = scene(first + i, sizes[i % len(sizes)])
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        Image.fromarray(numbers).save(folder / "masks" / f"{i}.png")
    return folder


def words(model, data, output, **settings):
    """The words of a short `doratune train`."""
    usual = {"objective": "semantic_segmentation", "model": model, "data": data, "output": output, "targets": "all-layers"}
    usual |= {"rank": 2, "lr": 5e-3, "batch_size": 4, "dtype": "float32", "tensorboard": "false", "log_steps": 1}
    usual |= {"class_names": f"[{', '.join(NAMES)}]"}
    return ["train", *(f"--{name}={value}" for name, value in (usual | settings).items())]
