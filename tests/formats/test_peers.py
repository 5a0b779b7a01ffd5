"""What we write, read by LyCORIS's and mlx-lm's own loaders, and their files by ours."""

import json

import pytest
import torch
from conftest import tiny_llama
from definitions import CLOSE, IDS, IMAGES, Convolutional, assert_merges_to, logits
from engines import engine
from test_convert import LLAMA, saved, weights_of

import doratune
from doratune.checkpoint.convert import convert


class TestLycoris:
    """lycoris-lora 4: `create_lycoris_from_weights` and `create_lycoris`."""

    @pytest.fixture
    def lycoris(self):
        return engine("lycoris")

    @pytest.mark.parametrize("method", ["lora", "dora", "loha", "dloha", "lokr", "dlokr"])
    @pytest.mark.parametrize("build", [tiny_llama, Convolutional])
    def test_it_reads_what_we_write(self, lycoris, method, build, tmp_path):
        targets = LLAMA if build is tiny_llama else ["first", "second", "head"]
        model = saved(tmp_path / "own", build, method=method, rank=2, alpha=3, targets=targets)
        convert(tmp_path / "own", "kohya", tmp_path / "x.safetensors", model=build())
        base = build()
        network, _ = lycoris.create_lycoris_from_weights(1.0, str(tmp_path / "x.safetensors"), base)
        assert len(network.loras) == len(list(doratune.adapters(model)))
        network.apply_to()
        with torch.no_grad():
            if build is tiny_llama:
                torch.testing.assert_close(logits(base), logits(model), **CLOSE)
            else:
                torch.testing.assert_close(base(IMAGES), model(IMAGES), **CLOSE)

    @pytest.mark.parametrize("algo", ["lora", "loha", "lokr"])
    @pytest.mark.parametrize(
        "settings", [{}, {"dora_wd": True}, {"dora_wd": True, "rs_lora": True}, {"dora_wd": True, "factor": 2}]
    )
    def test_we_read_what_it_writes(self, lycoris, algo, settings, tmp_path):
        base = Convolutional()
        network = lycoris.create_lycoris(base, 1.0, linear_dim=2, linear_alpha=3, algo=algo, **settings)
        network.apply_to()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, p in network.named_parameters():
                p.mul_(1.3) if "dora_scale" in name else p.copy_(0.4 * torch.randn(p.shape, generator=generator))
            expected = base(IMAGES)
        network.save_weights(str(tmp_path / "x.safetensors"), torch.float32, {})
        model = doratune.load(Convolutional(), tmp_path / "x.safetensors")
        with torch.no_grad():
            torch.testing.assert_close(model(IMAGES), expected, **CLOSE)
            assert (expected - Convolutional()(IMAGES)).abs().max() > 1e-3


class TestMlx:
    """mlx-lm: `load_adapters` on its own Llama, in fp32 on the CPU."""

    @pytest.fixture
    def llama(self, tmp_path):
        mx = engine("mlx.core")
        models = engine("mlx_lm.models.llama")
        base = tiny_llama()
        arguments = models.ModelArgs.from_dict(json.loads(base.config.to_json_string(use_diff=False)) | {"rope_theta": 10000.0})
        model = models.Model(arguments)
        weights = [(name, mx.array(t.detach().numpy())) for name, t in base.state_dict().items()]
        model.load_weights(weights, strict=True)
        return model

    def outputs(self, model):
        import mlx.core as mx
        import numpy as np

        mx.set_default_device(mx.cpu)
        return torch.from_numpy(np.array(model(mx.array(IDS.numpy()))))

    def test_the_same_base(self, llama):
        torch.testing.assert_close(self.outputs(llama), logits(tiny_llama()), **CLOSE)

    @pytest.mark.parametrize("method", ["lora", "dora"])
    def test_it_reads_what_we_write(self, llama, method, tmp_path):
        from mlx_lm.tuner.utils import load_adapters

        model = saved(tmp_path / "own", method=method, rank_overrides={"k_proj": 2}, targets=["q_proj", "k_proj", "down_proj"])
        convert(tmp_path / "own", "mlx", tmp_path / "mlx")
        torch.testing.assert_close(self.outputs(load_adapters(llama, str(tmp_path / "mlx"))), logits(model), **CLOSE)

    def test_its_own_file(self, llama, tmp_path):
        import mlx.core as mx
        from mlx.utils import tree_flatten
        from mlx_lm.tuner.utils import linear_to_lora_layers

        settings = {"rank": 3, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.down_proj"]}
        llama.freeze()
        linear_to_lora_layers(llama, 2, settings, use_dora=True)
        mx.random.seed(1)
        trained = dict(tree_flatten(llama.trainable_parameters()))
        assert {name.rpartition(".")[2] for name in trained} == {"lora_a", "lora_b", "m"}
        moved = {n: p * 1.2 if n.endswith(".m") else p + 0.1 * mx.random.normal(p.shape) for n, p in trained.items()}
        llama.load_weights(list(moved.items()), strict=False)
        folder = tmp_path / "theirs"
        folder.mkdir()
        mx.save_safetensors(str(folder / "adapters.safetensors"), moved)
        (folder / "adapter_config.json").write_text(
            json.dumps({"fine_tune_type": "dora", "num_layers": 2, "lora_parameters": settings, "model": "some/model"})
        )
        model = doratune.load(tiny_llama(), folder)
        torch.testing.assert_close(logits(model), self.outputs(llama), **CLOSE)
        convert(folder, "peft", tmp_path / "peft")
        assert_merges_to(doratune.load(tiny_llama(), tmp_path / "peft"), weights_of(model))
        assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/model"
