"""Models as they are loaded: what of their files stays in memory."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_llama

from doratune.support.models import load_model

MAPS = Path("/proc/self/maps")


@pytest.mark.skipif(not MAPS.exists(), reason="Linux tells what is mapped")
@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8", "none"])
def test_a_quantized_model_lets_go_of_the_file_that_it_was_read_from(quantize, tmp_path):
    """A mapped file counts as memory for as long as one tensor is a view of it."""
    pytest.importorskip("bitsandbytes")
    tiny_llama().save_pretrained(tmp_path)
    model = load_model(str(tmp_path), "float32", quantize)
    mapped = [line for line in MAPS.read_text().splitlines() if str(tmp_path) in line]
    assert bool(mapped) == (quantize == "none")  # unquantized weights are the file's own pages
    assert torch.equal(model.model.embed_tokens.weight, tiny_llama().model.embed_tokens.weight)
    assert model(torch.arange(3, 9)[None]).logits.isfinite().all()
