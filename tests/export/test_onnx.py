"""ONNX: the merged model exports and agrees, also one with LoRA alone; an attached DoRA is refused with the way out."""

import pytest
import torch
from conftest import randomize, tiny_gpt2, tiny_llama
from engines import engine

import doratune

IDS = torch.arange(3, 20)[None]


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


@pytest.fixture(autouse=True)
def _exporter():
    engine("onnx", "onnxscript", "onnxruntime")


def attached(model, **config):
    doratune.attach(model, doratune.AdapterConfig(**{"rank": 3} | config))
    return randomize(model)


def exported(model, file, dynamo=True):
    import onnxruntime

    torch.onnx.export(Logits(model).eval(), (IDS,), file, dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(file)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: IDS.numpy()})[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "config"), [(tiny_llama, {}), (tiny_llama, {"magnitude_axis": "input"}), (tiny_gpt2, {})])
def test_the_merged_model_agrees(make, config, tmp_path):
    model = attached(make(), **config)
    with torch.no_grad():
        expected = model(IDS).logits
    doratune.merge(model)
    found = exported(model, str(tmp_path / "model.onnx"))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("config", [{}, {"magnitude_axis": "input"}, {"targets": ["embed_tokens"]}])
def test_an_attached_one_is_refused_with_the_way_out(config, dynamo, tmp_path):
    model = attached(tiny_llama(), **config)
    with pytest.raises(Exception, match=r"call doratune\.merge\(model\) first"):
        exported(model, str(tmp_path / "model.onnx"), dynamo)
    with torch.no_grad():
        assert torch.isfinite(model(IDS).logits).all()  # it goes on working
    torch.compile(model, fullgraph=True, backend="eager")(IDS)


@pytest.mark.filterwarnings("ignore")
def test_lora_alone_exports_attached(tmp_path):
    model = attached(tiny_llama(), method="lora")
    with torch.no_grad():
        expected = model(IDS).logits
    found = exported(model, str(tmp_path / "model.onnx"))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
