"""VL-BART: transformers' BART behind visual features; as a folder, and under doratune's attach, save, load and merge."""

import json

import pytest
import torch
import transformers
from conftest import randomize
from seeing_bart import tiny_bart

import doratune
from doratune.checkpoint.base_model import load_base
from doratune.checkpoint.logits import agreement
from doratune.checkpoint.merge import merge_checkpoint
from doratune.checkpoint.quantized import merge_quantized
from doratune.errors import UserError
from doratune.support.vl_bart import VISUAL, VisualInput, VLBartForConditionalGeneration, load_vl_bart, visual_input

SEEN = VisualInput(size=12, places=5, tower="my-tower", fingerprint="abc")


@pytest.fixture(scope="module")
def bart(tmp_path_factory):
    return str(tiny_bart(tmp_path_factory.mktemp("bart") / "bart"))


def inputs(batch=2, cells=5, tokens=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    places = torch.stack([torch.zeros(batch, cells, dtype=torch.long), torch.arange(cells).expand(batch, -1)], -1)
    return {
        "input_ids": torch.randint(5, 250, (batch, tokens), generator=generator),
        "visual_features": torch.randn(batch, cells, SEEN.size, generator=generator),
        "visual_places": places,
        "decoder_input_ids": torch.randint(5, 250, (batch, 3), generator=generator),
    }


@torch.no_grad()
def logits(model, **given):
    return model.eval()(**given).logits


def moved(model):
    """The model with an adapter on q and v that left its start, and a visual embedding as if trained."""
    doratune.attach(model, doratune.AdapterConfig(rank=2, targets=["q_proj", "v_proj"]))
    return randomize(model)


def test_without_features_it_is_bart(bart):
    ours, theirs = load_vl_bart(bart, SEEN), transformers.BartForConditionalGeneration.from_pretrained(bart)
    one = {name: value for name, value in inputs().items() if not name.startswith("visual")}
    assert torch.equal(logits(ours, **one), logits(theirs.eval(), **one))
    assert visual_input(bart) is None and VisualInput.of(ours.config) == SEEN


def test_text_keeps_its_positions_and_places_tell_features_apart(bart):
    """What is read in front does not shift the text; without places the encoder could not tell an order."""
    model, one = load_vl_bart(bart, SEEN), inputs(batch=1)
    masked = one | {"attention_mask": torch.tensor([[0] * 5 + [1] * 6])}
    alone = {name: value for name, value in one.items() if not name.startswith("visual")}
    assert torch.allclose(logits(model, **masked), logits(model, **alone), atol=1e-6)
    turned = one | {"visual_features": one["visual_features"].flip(1), "visual_places": one["visual_places"].flip(1)}
    assert torch.allclose(logits(model, **one), logits(model, **turned), atol=1e-6)  # a set of (feature, place)
    assert not torch.allclose(logits(model, **one), logits(model, **one | {"visual_features": one["visual_features"].flip(1)}))
    second = torch.stack([torch.ones(1, 5, dtype=torch.long), one["visual_places"][..., 1]], -1)
    assert not torch.allclose(logits(model, **one), logits(model, **one | {"visual_places": second}))


def test_padded_features_and_text_change_nothing(bart):
    model, one = load_vl_bart(bart, SEEN), inputs(batch=1)
    padded = {
        "input_ids": torch.nn.functional.pad(one["input_ids"], (0, 3)),
        "visual_features": torch.nn.functional.pad(one["visual_features"], (0, 0, 0, 2), value=7.0),
        "visual_places": torch.nn.functional.pad(one["visual_places"], (0, 0, 0, 2)),
        "attention_mask": torch.tensor([[1] * 5 + [0] * 2 + [1] * 6 + [0] * 3]),
        "decoder_input_ids": one["decoder_input_ids"],
    }
    assert torch.allclose(logits(model, **padded), logits(model, **one), atol=1e-6)
    written = [m.generate(**{k: v for k, v in i.items() if k != "decoder_input_ids"}, max_new_tokens=5, num_beams=beams)
               for m, i, beams in [(model, padded, 1), (model, one, 1), (model, padded, 3), (model, one, 3)]]  # fmt: skip
    assert torch.equal(written[0], written[1]) and torch.equal(written[2], written[3])


def test_a_folder_of_it(bart, tmp_path):
    model = load_vl_bart(bart, SEEN)
    model.save_pretrained(tmp_path / "seeing")
    config = json.loads((tmp_path / "seeing" / "config.json").read_text())
    assert config["architectures"] == ["VLBartForConditionalGeneration"] and config["visual"]["tower"] == "my-tower"
    again = load_vl_bart(str(tmp_path / "seeing"), complete=True)
    assert torch.equal(logits(again, **inputs()), logits(model, **inputs()))
    direct = VLBartForConditionalGeneration.from_pretrained(tmp_path / "seeing")
    assert torch.equal(logits(direct, **inputs()), logits(model, **inputs()))
    assert transformers.AutoConfig.from_pretrained(tmp_path / "seeing").model_type == "bart"


def test_attach_save_load_merge(bart, tmp_path):
    """A drawn visual embedding is trained and saved without being asked; the merged folder is a whole VL-BART."""
    model = moved(load_vl_bart(bart, SEEN))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "visual" in name} == {
        f"{VISUAL}.{name}" for name, _ in model.model.encoder.visual.named_parameters()
    }
    doratune.save(model, tmp_path / "adapter")
    torch.manual_seed(9)
    other = load_base(bart, tmp_path / "adapter")
    doratune.load(other, tmp_path / "adapter")
    before = logits(model, **inputs())
    assert torch.allclose(logits(other, **inputs()), before, atol=1e-6)
    merge_checkpoint(bart, tmp_path / "adapter", tmp_path / "merged")
    assert agreement(bart, tmp_path / "adapter", tmp_path / "merged", "float32").ok
    merged = load_vl_bart(str(tmp_path / "merged"), complete=True)
    assert torch.allclose(logits(merged, **inputs()), before, atol=1e-4)
    assert VisualInput.of(merged.config) == SEEN
    plain = transformers.BartForConditionalGeneration.from_pretrained(tmp_path / "merged")
    text = {name: value for name, value in inputs().items() if not name.startswith("visual")}
    assert torch.allclose(logits(plain, **text), logits(merged, **text), atol=1e-6)
    doratune.merge(model)
    assert torch.allclose(logits(model, **inputs()), before, atol=1e-4)


@pytest.mark.parametrize("into", ["dequantized", "same"])
def test_over_a_base_in_four_bits(into, tmp_path):
    """The visual embedding and the head stay dense; the merged folder is a VL-BART, in 4 bits or not."""
    pytest.importorskip("bitsandbytes")
    wide = str(tiny_bart(tmp_path / "wide", d_model=64, encoder_ffn_dim=128, decoder_ffn_dim=128))
    model = moved(load_vl_bart(wide, SEEN, "bfloat16", "nf4"))
    assert type(model.model.encoder.visual.project).__name__ == "Linear"
    doratune.save(model, tmp_path / "adapter")
    before = logits(model, **inputs()).float()
    merge_quantized(wide, tmp_path / "adapter", tmp_path / "merged", into, "bfloat16")
    merged = load_vl_bart(str(tmp_path / "merged"), dtype="bfloat16", complete=True)
    assert bool(getattr(merged, "is_quantized", False)) == (into == "same")
    far = (logits(merged, **inputs()).float() - before).norm() / before.norm()
    assert far < (0.2 if into == "same" else 0.03)


def test_one_that_sees_already_is_adapted_as_any_other(bart, tmp_path):
    """Its visual embedding comes from a file: frozen, unless it is named."""
    load_vl_bart(bart, SEEN).save_pretrained(tmp_path / "seeing")
    model = moved(load_vl_bart(str(tmp_path / "seeing")))
    assert not [name for name, p in model.named_parameters() if p.requires_grad and "visual" in name]
    wider = VisualInput(size=13, places=5)
    with pytest.raises(UserError, match="reads 5 features of 12 numbers, these are 5 of 13"):
        load_vl_bart(str(tmp_path / "seeing"), wider)


def test_what_is_no_bart_is_refused(bart, tiny_folder):
    for name, more, said in (
        (str(tiny_folder), {"visual": SEEN}, "is a llama; give a BART"),
        (bart, {}, "reads text alone; train it on features first"),
        (bart, {"visual": SEEN, "complete": True}, "transformers would take random weights"),
    ):
        with pytest.raises(UserError, match=said):
            load_vl_bart(name, **more)
