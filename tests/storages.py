"""Small linear layers in every storage, each with its dequantized weight taken from the quantizer's own library."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import doratune.bases

ROWS, COLUMNS = 96, 64


@dataclass
class Stored:
    """A model with one layer under the name "layer", W as its library dequantizes it, the dtype of its inputs."""

    model: nn.Module
    W: torch.Tensor
    dtype: torch.dtype
    again: float = 0.0
    """Largest error of quantizing again, per number: given where the storage can."""

    @property
    def layer(self):
        return self.model.layer


def _source(dtype, bias=True, columns=COLUMNS) -> nn.Linear:
    source = nn.Linear(columns, ROWS, bias=bias).to(dtype)
    with torch.no_grad():
        source.weight.mul_(torch.linspace(0.3, 3, ROWS)[:, None])
    return source.requires_grad_(False)


def _stored(layer, W, dtype, **more) -> Stored:
    model = nn.Sequential()
    model.add_module("layer", layer)
    return Stored(model.requires_grad_(False), W.detach().clone(), dtype, **more)


def _four_bit(dtype, kind="nf4", columns=COLUMNS, compute=None, **more) -> Stored:
    bnb = pytest.importorskip("bitsandbytes")
    source = _source(dtype, columns=columns)
    layer = bnb.nn.Linear4bit(columns, ROWS, compute_dtype=compute, quant_type=kind, **more)
    layer.load_state_dict(source.state_dict())
    layer.weight = bnb.nn.Params4bit(source.weight.data, requires_grad=False, quant_type=kind, module=layer, **more)
    layer.bias = source.bias
    layer.to("cpu")
    W = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return _stored(layer, W, dtype, again=0.16 if kind == "nf4" else 0.17)  # half the widest gap of the code


def _eight_bit(dtype, **more) -> Stored:
    bnb = pytest.importorskip("bitsandbytes")
    source = _source(dtype)
    layer = bnb.nn.Linear8bitLt(COLUMNS, ROWS, has_fp16_weights=False, **more)
    layer.load_state_dict(source.state_dict())
    layer.bias.data = source.bias.data
    layer.to("cpu")
    W = bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    return _stored(layer, W, dtype, again=0.51 / 127 + 2**-10)


def _torchao(dtype, config: str, **more) -> Stored:
    quantization = pytest.importorskip("torchao.quantization")
    layer = _source(dtype)
    quantization.quantize_(layer, getattr(quantization, config)(**more))
    return _stored(layer, layer.weight.dequantize(), dtype, again=0.07 if "Float8" in config else 0.51 / 127 + 2**-7)


def _hqq(dtype, bits: int, axis: int, group=32) -> Stored:
    quantize = pytest.importorskip("hqq.core.quantize")
    settings = quantize.BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis)
    layer = quantize.HQQLinear(_source(dtype), settings, compute_dtype=dtype, device="cpu")
    return _stored(layer, layer.dequantize(), dtype, again=1.2 / (2**bits - 1))


class SignScale(nn.Module):
    """A quantizer of our own: W = scale_o · (−2 … 2), in int8."""

    rounds = False

    def __init__(self, source: nn.Linear):
        super().__init__()
        self.out_features, self.in_features = source.weight.shape
        scale = source.weight.detach().abs().amax(1, keepdim=True) / 2
        self.register_buffer("codes", (source.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("step", scale)
        self.bias = nn.Parameter(source.bias.detach())

    def forward(self, x):
        if self.rounds:
            x = (x / x.abs().amax() * 15).round() / 15 * x.abs().amax()
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.step, self.bias)


class NoGradient(SignScale):
    """Its kernel is unknown to autograd, and its tensors are named as GPTQ's and AWQ's are."""

    def __init__(self, source):
        super().__init__(source)
        self.qweight, self.scales, self.qzeros = self.codes, self.step, torch.zeros(1)

    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class Rounding(SignScale):
    rounds = True


def _own(dtype, cls=SignScale, rows=False) -> Stored:
    if cls is not NoGradient:
        doratune.bases.register(
            lambda module: isinstance(module, SignScale) and not isinstance(module, NoGradient),
            rows=(lambda module, which: module.codes[which].to(module.step.dtype) * module.step[which]) if rows else None,
            name="of the tests",
        )
    layer = cls(_source(dtype))
    return _stored(layer, layer.codes.to(dtype) * layer.step, dtype)


@pytest.fixture
def _registry():
    from doratune.bases import opaque

    before = dict(opaque.REGISTERED)
    yield
    opaque.REGISTERED.clear()
    opaque.REGISTERED.update(before)


BASES: dict[str, Any] = {
    "nf4": lambda dtype: _four_bit(dtype, compress_statistics=False),
    "nf4, double": _four_bit,
    "fp4": lambda dtype: _four_bit(dtype, "fp4"),
    "nf4, odd rows": lambda dtype: _four_bit(dtype, columns=36),
    "nf4, a block and a half": lambda dtype: _four_bit(dtype, columns=96),
    "nf4, stored as bf16": lambda dtype: _four_bit(dtype, quant_storage=torch.bfloat16),
    "bitsandbytes int8": _eight_bit,
    "torchao int8": lambda dtype: _torchao(dtype, "Int8WeightOnlyConfig"),
    "torchao float8": lambda dtype: _torchao(dtype, "Float8WeightOnlyConfig"),
    "torchao intx": lambda dtype: _torchao(dtype, "IntxWeightOnlyConfig"),
    "torchao int8, dynamic": lambda dtype: _torchao(dtype, "Int8DynamicActivationInt8WeightConfig"),
    "HQQ 4 bit": lambda dtype: _hqq(dtype, 4, 1),
    "HQQ 8 bit": lambda dtype: _hqq(dtype, 8, 1),
    "HQQ 3 bit": lambda dtype: _hqq(dtype, 3, 1),
    "HQQ 4 bit, columns": lambda dtype: _hqq(dtype, 4, 0),
    "registered, with rows": lambda dtype: _own(dtype, rows=True),
    "registered, forward only": _own,
    "GPTQ or AWQ (an imitation without gradient)": lambda dtype: _own(dtype, NoGradient),
}


def build(name: str, dtype=torch.bfloat16, seed=0) -> Stored:
    torch.manual_seed(seed)
    return BASES[name](dtype)
