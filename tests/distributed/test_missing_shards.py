"""A checkpoint in shards of which some are not there, or that is another model's: named, before anything is written."""

import json

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama

import doratune
from doratune.checkpoint.adapter import load_weights
from doratune.checkpoint.merge import merge_checkpoint
from doratune.errors import UserError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders")
    tiny_llama().save_pretrained(folder / "base", max_shard_size="20KB")
    doratune.save(doratune.attach(tiny_llama(), doratune.AdapterConfig(rank=2)), folder / "adapter")
    return folder


@pytest.mark.parametrize("lost", [[0], [1, 3]])
def test_missing_shards_are_named(folders, lost, tmp_path):
    copy = tmp_path / "base"
    copy.mkdir()
    shards = sorted((folders / "base").glob("*.safetensors"))
    assert len(shards) > 4
    for path in (folders / "base").iterdir():
        if path not in [shards[i] for i in lost]:
            (copy / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError) as error:
        merge_checkpoint(str(copy), folders / "adapter", tmp_path / "out")
    assert all(shards[i].name in str(error.value) for i in lost) and "model.safetensors.index.json names" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_index_without_a_shard_of_its_own(folders, tmp_path):
    copy = tmp_path / "base"
    copy.mkdir()
    for path in (folders / "base").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "model-00099-of-00099.safetensors"
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"lacks model-00099-of-00099\.safetensors"):
        merge_checkpoint(str(copy), folders / "adapter", tmp_path / "out")


@pytest.mark.parametrize(
    ("model", "settings", "said"),
    [
        (tiny_gpt2, {}, "fits nothing in the model"),
        (tiny_llama, {"rank": 3}, "has shape"),
        (tiny_llama, {"targets": ["q_proj"]}, "fits nothing in the model"),
        (tiny_llama, {"method": "lora"}, "magnitude"),
    ],
)
def test_another_adapters_checkpoint_is_refused_with_the_differences(folders, model, settings, said):
    attached = doratune.attach(model(), doratune.AdapterConfig(**{"rank": 2} | settings))
    before = {key: t.clone() for key, t in attached.state_dict().items()}
    with pytest.raises(UserError, match=said):
        load_weights(attached, folders / "adapter")
    assert all(torch.equal(t, before[key]) for key, t in attached.state_dict().items())
