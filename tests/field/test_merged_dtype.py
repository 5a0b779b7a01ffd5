"""A quantized layer that was merged computes in what the model around it computes in, whatever else of that is adapted."""

import pytest
import torch
from storages import BASES, COLUMNS, ROWS, _registry  # noqa: F401 (a fixture)
from torch import nn

import doratune
from doratune import AdapterConfig

QUANTIZED = ["int8", "nf4", "torchao int8", "HQQ 4 bit", "registered, with rows"]


class Between(nn.Module):
    """A quantized layer between an embedding and a head in the dtype of the model."""

    def __init__(self, stored, dtype):
        super().__init__()
        self.tokens = nn.Embedding(20, COLUMNS).to(dtype)
        self.layer = stored.layer
        self.norm = nn.LayerNorm(ROWS).to(dtype)
        self.head = nn.Linear(ROWS, 7).to(dtype)

    def forward(self, ids):
        return self.head(self.norm(self.layer(self.tokens(ids))))


def storage(name, dtype, bias=True):
    stored = BASES["bitsandbytes int8" if name == "int8" else name](dtype)
    if not bias:
        stored.layer.bias = None
    return stored


@pytest.mark.usefixtures("_registry")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("targets", "also_train"),
    [
        (["layer"], []),
        (["layer", "tokens", "head"], ["norm"]),
        (["layer", "head"], ["tokens", "norm"]),
        (["layer"], ["tokens", "norm", "head"]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", QUANTIZED)
def test_the_rest_of_the_model_is_adapted(name, dtype, targets, also_train, bias):
    torch.manual_seed(0)
    model = Between(storage(name, dtype, bias), dtype)
    doratune.attach(model, AdapterConfig(rank=2, targets=targets, also_train=also_train))
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        adapted = model(ids).float()
        doratune.merge(model)
        merged = model(ids).float()
    assert model.layer.weight.dtype == dtype
    torch.testing.assert_close(merged, adapted, rtol=0.1, atol=0.1)
    doratune.unmerge(model)
    assert torch.equal(model(ids).float(), adapted)


@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_but_int8(dtype, called):
    """Nothing in the model tells its dtype: what the layer was last called with does, else PyTorch's default."""
    model = storage("int8", dtype, bias=False).model
    doratune.attach(model, AdapterConfig(rank=2, targets=["layer"]))
    x = torch.randn(3, COLUMNS).to(dtype)
    if called:
        model(x)
    doratune.merge(model)
    model(x if called else x.float())
