"""PEFT's folders of other layer kinds and directions, both ways: convolutions, embeddings, VeRA, offset starts."""

import warnings

import grid
import peft
import pytest
import torch
from conftest import randomize, tiny_gpt2, tiny_llama
from torch import nn

import doratune
from doratune import AdapterConfig
from doratune.errors import UserError

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


class Mixed(nn.Module):
    """An embedding, convolutions in one to three dimensions, a linear layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 12)
        self.conv1 = nn.Conv1d(12, 8, 3, padding=1, bias=True)
        self.conv2 = nn.Conv2d(8, 10, 3, stride=2, padding=1)
        self.conv3 = nn.Conv3d(1, 6, 2, bias=False)
        self.head = nn.Linear(6, 5)

    def forward(self, ids):
        x = torch.relu(self.conv1(self.embed(ids).transpose(1, 2)))
        x = torch.relu(self.conv2(x[:, :, None].expand(-1, -1, 4, -1)))
        return self.head(self.conv3(x[:, None]).mean((2, 3, 4)))


NAMES = ["embed", "conv1", "conv2", "conv3", "head"]


def mixed_ids():
    return torch.randint(0, 20, (3, 9), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def shake(model):
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if "lora" in name or "vera_lambda" in name:
            noise = torch.randn(p.shape, generator=generator)
            p.mul_(1 + 0.1 * noise.abs()) if "magnitude" in name else p.add_(0.3 * noise)
    return model


@pytest.mark.parametrize("use_dora", [True, False])
@pytest.mark.parametrize("use_rslora", [True, False])
def test_theirs_in_ours(use_dora, use_rslora, tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=NAMES, use_dora=use_dora, use_rslora=use_rslora)
    theirs = shake(peft.get_peft_model(Mixed(), config)).eval()
    theirs.save_pretrained(tmp_path)
    model = doratune.load(Mixed(), tmp_path)
    assert len(dict(doratune.adapters(model))) == 5
    torch.testing.assert_close(model(mixed_ids()), theirs(mixed_ids()), **TOLERANCE)
    doratune.merge(model)
    torch.testing.assert_close(model(mixed_ids()), theirs(mixed_ids()), **TOLERANCE)


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_ours_in_peft(method, tmp_path):
    model = Mixed()
    config = AdapterConfig(method=method, rank=4, alpha=6, targets=NAMES, embedding_magnitude="dimension")
    randomize(doratune.attach(model, config))
    doratune.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(Mixed(), tmp_path).eval()
    torch.testing.assert_close(theirs(mixed_ids()), model(mixed_ids()), **TOLERANCE)


def test_a_magnitude_per_token_is_never_written_as_peft(tmp_path):
    model = doratune.attach(Mixed(), AdapterConfig(rank=4, targets=["embed"]))
    with pytest.raises(UserError, match="magnitude per token"):
        doratune.save(model, tmp_path, format="peft")
    doratune.save(model, tmp_path)
    with pytest.raises((ValueError, KeyError)):
        peft.PeftModel.from_pretrained(Mixed(), tmp_path)


@pytest.mark.parametrize(
    ("settings", "reason"), [({"groups": 2}, "groups=2"), ({"dilation": 2}, "dilation"), ({"padding_mode": "reflect"}, "reflect")]
)
def test_bent_convolutions_of_peft_are_refused_and_ours_are_right(settings, reason, tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, **settings))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(build(), peft.LoraConfig(r=4, target_modules=["0"], use_dora=settings != {"groups": 2}))
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match=f"{reason}.*cannot merge"):
        doratune.load(build(), tmp_path / "theirs")
    model = randomize(doratune.attach(build(), AdapterConfig(rank=4, targets=["0"])))
    x = torch.randn(2, 8, 6, 6)
    y = model(x)
    with pytest.raises(UserError, match=reason):
        doratune.save(model, tmp_path / "ours", format="peft")
    doratune.save(model, tmp_path / "ours")
    assert torch.equal(doratune.load(build(), tmp_path / "ours")(x), y)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("saved", [True, False])
def test_vera_of_peft_in_ours(build, saved, tmp_path):
    names = ["q_proj", "down_proj"] if build is tiny_llama else ["c_attn", "c_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.VeraConfig(r=8, target_modules=names, save_projection=saved, projection_prng_key=7)
        theirs = shake(peft.get_peft_model(build(), config)).eval()
        theirs.save_pretrained(tmp_path)
    model = doratune.load(build(), tmp_path)
    with torch.no_grad():
        expected = theirs(input_ids=IDS).logits
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, **TOLERANCE)
        assert (expected - build()(input_ids=IDS).logits).abs().max() > 1e-3


def test_vera_of_ours_in_peft(tmp_path):
    model = doratune.attach(tiny_llama(), AdapterConfig(method="vera", rank=8, targets=["q_proj", "down_proj"], seed=3))
    with torch.no_grad():
        for _, layer in doratune.adapters(model):
            layer.vera_b.normal_()
            layer.vera_d.normal_()
        doratune.save(model, tmp_path)
        theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
        torch.testing.assert_close(theirs(input_ids=IDS).logits, model(input_ids=IDS).logits, **TOLERANCE)


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("rank_scaling", ["standard", "rslora"])
def test_an_offset_start_is_an_ordinary_lora_in_peft(start, rank_scaling, tmp_path):
    config = AdapterConfig(
        rank=4, start=start, rank_scaling=rank_scaling, targets=["q_proj", "v_proj"], rank_overrides={"v_proj": 2}
    )
    model = doratune.attach(tiny_llama(), config)
    torch.testing.assert_close(model(input_ids=IDS).logits, tiny_llama()(input_ids=IDS).logits, rtol=0, atol=0)
    for name, layer in doratune.adapters(model):
        grid.move(layer, seed=len(name))
    doratune.save(model, tmp_path)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
        torch.testing.assert_close(theirs(input_ids=IDS).logits, expected, **TOLERANCE)
        again = doratune.load(tiny_llama(), tmp_path, trainable=True)
        torch.testing.assert_close(again(input_ids=IDS).logits, expected, **TOLERANCE)
    for (_, a), (_, b) in zip(doratune.adapters(model), doratune.adapters(again), strict=True):
        torch.testing.assert_close(b.lora_A, a.lora_A)
        assert b.lora_A.requires_grad and not b.start_A.requires_grad
