"""What a model reads of masks, and what its pixels cost: against transformers' own processors and losses."""

import numpy as np
import pytest
import torch
import transformers
from mask_models import KINDS, SIDE, mask_model, scene
from PIL import Image
from transformers import AutoModelForSemanticSegmentation

from doratune.data.encode import IGNORED
from doratune.data.masks import MaskedImage
from doratune.training.mask_rows import PixelLoss, is_whole, prepared_mask


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder of each kind: with a classifier's head, or one for two kinds of masks."""
    folder = tmp_path_factory.mktemp("bases")
    return {kind: mask_model(kind, folder / kind, body=kind in ("segformer", "mobilevit")) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_model_s_own(kind, bases):
    """With its auxiliary head, and without the pixels of no class; summed over a step it is that of one large batch."""
    model = AutoModelForSemanticSegmentation.from_pretrained(bases[kind], num_labels=3, ignore_mismatched_sizes=True).train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm | torch.nn.modules.dropout._DropoutNd):
            module.eval()
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(4, 3, SIDE, SIDE, generator=generator)
    gold = torch.randint(3, (4, SIDE, SIDE), generator=generator)
    gold[:2, :5] = IGNORED
    theirs = model(pixel_values=pixels, labels=torch.where(gold == IGNORED, 255, gold)).loss
    loss = PixelLoss()
    loss.watch(model)
    ours = loss(model(pixel_values=pixels), gold)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    count = (gold != IGNORED).sum()
    parts = [loss(model(pixel_values=pixels[i : i + 2]), gold[i : i + 2], count) for i in (0, 2)]
    assert sum(part.item() for part in parts) == pytest.approx(ours.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["segformer", "mobilevit", "beit"])
def test_masks_go_through_the_processor_as_images_do(kind, bases):
    """As its own `segmentation_maps` do; numbers beyond 8 bits stay, padding is of no class."""
    processor = transformers.AutoImageProcessor.from_pretrained(bases[kind], backend="pil")
    pixels, numbers = scene(3, (50, 41))
    theirs = processor(Image.fromarray(pixels), segmentation_maps=Image.fromarray(numbers))["labels"][0]
    processor.do_reduce_labels = True  # what a pretraining's masks wanted is not done to these
    assert (prepared_mask(numbers.astype(np.int64), "x", processor).numpy() == theirs).all()
    high = np.where(numbers == 2, 40_000, numbers.astype(np.int64) * 300)
    high[numbers == 0] = IGNORED
    assert set(prepared_mask(high, "x", processor).unique().tolist()) == {IGNORED, 300, 40_000}
    assert [is_whole(size, "x", processor) for size in ((50, 41), (9, 200))] == [kind != "mobilevit"] * 2  # that one cuts


def test_padding_is_of_no_class():
    processor = transformers.ConvNextImageProcessorPil(size={"shortest_edge": 384})
    assert is_whole((8, 8), "x", processor) and (prepared_mask(np.zeros((8, 8), np.int64), "x", processor) == 0).all()
    cut = transformers.ViTImageProcessorPil(do_resize=False)
    padded = transformers.BeitImageProcessorPil(do_resize=False, do_center_crop=True, crop_size={"height": 12, "width": 12})
    assert is_whole((8, 8), "x", cut) and not is_whole((8, 8), "x", padded)
    assert set(prepared_mask(np.zeros((8, 8), np.int64), "x", padded).unique().tolist()) == {IGNORED, 0}


def test_reduced_labels_are_those_of_transformers(tmp_path):
    numbers = np.array([[0, 1, 2], [150, 255, 254]], np.uint8)
    Image.fromarray(numbers).save(tmp_path / "m.png")
    Image.new("RGB", (3, 2)).save(tmp_path / "i.png")
    ours = MaskedImage("0", tmp_path / "i.png", tmp_path / "m.png", reduced=True).open()[1]
    processor = transformers.SegformerImageProcessorPil(do_resize=False, do_reduce_labels=True)
    theirs = processor(Image.new("RGB", (3, 2)), segmentation_maps=Image.fromarray(numbers))["labels"][0]
    known = np.where(ours == IGNORED, 255, ours)
    assert (known == theirs)[numbers < 254].all() and known[0, 0] == 255 and known[1, 0] == 149
