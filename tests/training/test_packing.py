"""Packed examples: the loss and the gradients of the unpacked ones, on every attention that runs here; refused where they see each
other."""

import json

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama

import doratune
from doratune.data import encoder
from doratune.data.encode import IGNORED, AnswerCollator, encode_all
from doratune.data.packing import PackingCollator, examples_of, pack, without_mask
from doratune.errors import UserError
from doratune.training.packing import check_packing
from doratune.training.recipe import TrainRecipe
from doratune.training.train import train


def rows_of(tokenizer, count=12):
    items = [
        {
            "messages": [
                {"role": "user", "content": f"q{n} " * (1 + n % 4)},
                {"role": "assistant", "content": "a" + " word" * (n % 7)},
            ]
        }
        for n in range(count)
    ]
    return encode_all(items, encoder("chat"), tokenizer, 100)[0]


def two_turns(tokenizer):
    turns = [("user", "hi"), ("assistant", "one"), ("user", "more"), ("assistant", "two")]
    return encode_all([{"messages": [{"role": r, "content": c} for r, c in turns]}], encoder("chat"), tokenizer, 100)[0]


def adapted(model, **settings):
    torch.manual_seed(1)
    doratune.attach(model, doratune.AdapterConfig(rank=4, targets=["q_proj", "v_proj", "down_proj"], **settings))
    for _, layer in doratune.adapters(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model


def loss_and_gradients(model, batches):
    """The mean over all answer tokens of all batches, as a Trainer with accumulation has it."""
    count = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(**without_mask(batch), num_items_in_batch=torch.tensor(count)).loss
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_loss_and_the_gradients_are_those_of_unpacked_examples(attention, batch, tiny_tokenizer):
    model = adapted(tiny_llama())
    model.set_attn_implementation(attention)
    rows = rows_of(tiny_tokenizer) + two_turns(tiny_tokenizer)
    packs = pack(rows, 100)
    assert len(packs) < len(rows) / 2 and examples_of(packs) == len(rows)
    collate, single = PackingCollator(0, model), AnswerCollator(0, model)
    expected, gradients = loss_and_gradients(model, [single([row]) for row in rows])
    loss, packed_gradients = loss_and_gradients(model, [collate(packs[i : i + batch]) for i in range(0, len(packs), batch)])
    assert abs(loss - expected) < 1e-6 * expected
    assert gradients.keys() == packed_gradients.keys() and gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_rotary_and_learned_positions_restart(make, tiny_tokenizer):
    model = make()
    packs, collate = pack(rows_of(tiny_tokenizer), 100), PackingCollator(0, model)
    for row in packs:
        batch = collate([row])
        with torch.no_grad():
            together = model(**{k: v for k, v in without_mask(batch).items() if k not in ("labels", "logits_to_keep")}).logits[0]
            start = 0
            for length in row["lengths"]:
                alone = model(input_ids=torch.tensor([row["input_ids"][start : start + length]])).logits[0]
                torch.testing.assert_close(together[start : start + length], alone, rtol=1e-4, atol=1e-5)
                start += length


def test_one_row_for_flash_attention(tiny_tokenizer):
    """All rows in one, as its kernel wants them; on CPU the block mask of SDPA over that row gives the same loss."""
    model = adapted(tiny_llama())
    packs, collate = pack(rows_of(tiny_tokenizer), 60), PackingCollator(0, model)
    apart = loss_and_gradients(model, [collate([row]) for row in packs])[0]
    model.config._attn_implementation_internal = "flash_attention_2"
    flat = PackingCollator(0, model)
    batch = flat(packs)
    assert batch["input_ids"].shape == batch["position_ids"].shape == (1, sum(row["length"] for row in packs))
    from transformers import DataCollatorWithFlattening

    examples = []
    for row in packs:
        start = 0
        for length in row["lengths"]:
            examples.append({k: row[k][start : start + length] for k in ("input_ids", "labels")})
            start += length
    theirs = DataCollatorWithFlattening(return_tensors="pt")(examples)
    assert torch.equal(theirs["input_ids"], batch["input_ids"]) and torch.equal(theirs["position_ids"], batch["position_ids"])
    assert torch.equal(theirs["labels"][:, batch["logits_to_keep"]], batch["labels"])
    model.config._attn_implementation_internal = "sdpa"
    assert abs(loss_and_gradients(model, [batch])[0] - apart) < 1e-6 * apart


def test_nothing_is_lost_and_no_row_too_long():
    import random

    generator = random.Random(0)
    for length in (64, 100, 1000):
        rows = [
            {"input_ids": [n] * size, "labels": [n] * size, "length": size}
            for n, size in enumerate(generator.choices(range(1, 65), k=300))
        ]
        packs = pack(rows, length)
        assert max(row["length"] for row in packs) <= length
        seen = sorted(token for row in packs for token in row["input_ids"])
        assert seen == sorted(token for row in rows for token in row["input_ids"])
        assert all(sum(row["lengths"]) == row["length"] == len(row["labels"]) for row in packs)
        assert sum(row["length"] for row in packs) > 0.9 * length * (len(packs) - 1)
        assert packs == pack(rows, length) and packs != pack(rows, length, seed=1)


def test_models_whose_examples_would_see_each_other_are_refused(tiny_tokenizer):
    from transformers import MambaConfig, MambaForCausalLM, OPTConfig, OPTForCausalLM

    check_packing(tiny_llama(), PackingCollator(0, tiny_llama()))
    check_packing(tiny_gpt2(), PackingCollator(0, tiny_gpt2()))
    check_packing(tiny_llama(dtype=torch.bfloat16), PackingCollator(0, tiny_llama()))
    mamba = MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(UserError, match="takes position_ids, and MambaForCausalLM does not; set packing: false"):
        check_packing(mamba, PackingCollator(0, mamba))
    model = tiny_llama()
    inner = model.model.layers[0].self_attn.forward

    def unmasked(*args, **kwargs):
        return inner(*args, **kwargs | {"attention_mask": None})

    model.model.layers[0].self_attn.forward = unmasked
    with pytest.raises(UserError, match="lets the examples of a row see each other; set packing: false"):
        check_packing(model, PackingCollator(0, model))
    opt = OPTForCausalLM(OPTConfig(vocab_size=300, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2)).eval()
    with pytest.raises(UserError, match="OPTForCausalLM lets the examples of a row see each other"):
        check_packing(opt, PackingCollator(0, opt))


def recipe(folder, tmp_path, **settings):
    items = [{"instruction": f"q {n} " * (n % 9 + 1), "output": "the correct answer is true " * (n % 4 + 1)} for n in range(40)]
    data = tmp_path / "x.jsonl"
    data.write_text("\n".join(json.dumps(item) for item in items))
    common = {"model": str(folder), "data": str(data), "rank": 2, "tensorboard": False, "dtype": "float32", "max_length": 700}
    return TrainRecipe(
        **common | {"output": str(tmp_path / "run"), "batch_size": 2, "lr": 5e-3, "eval_size": 4, "log_steps": 1} | settings
    )


def test_a_packed_run_trains_counts_and_resumes(tiny_folder, tmp_path):
    said = []
    metrics = train(recipe(tiny_folder, tmp_path, packing=True, epochs=3), say=said.append)
    assert metrics["examples"] == 36 and metrics["steps"] < 3 * 36 / 2
    assert any(line.startswith("packing: 36 examples in ") and line.endswith("counts rows") for line in said)
    apart = train(recipe(tiny_folder, tmp_path, output=str(tmp_path / "apart"), epochs=3), say=lambda line: None)
    assert metrics["tokens"] == apart["tokens"]
    losses = [row["loss"] for row in metrics["log"] if "loss" in row]
    assert losses[-1] < losses[0]
    first = [row["eval_loss"] for row in metrics["log"] if "eval_loss" in row]
    assert len(first) == 3 and first[-1] < first[0]


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tiny_folder, tmp_path):
    settings = {"packing": True, "schedule": "constant", "eval_size": 0, "save_steps": 3}
    whole = train(recipe(tiny_folder, tmp_path, max_steps=9, output=str(tmp_path / "whole"), **settings), say=lambda line: None)
    train(recipe(tiny_folder, tmp_path, max_steps=6, **settings), say=lambda line: None)
    resumed = train(recipe(tiny_folder, tmp_path, max_steps=9, resume=True, **settings), say=lambda line: None)
    assert [row["loss"] for row in resumed["log"]][-3:] == pytest.approx([row["loss"] for row in whole["log"]][-3:], rel=1e-5)


@pytest.mark.parametrize("method", ["full", "series", "prefix"])
def test_the_other_methods_pack(method, tiny_folder, tmp_path):
    settings = recipe(
        tiny_folder, tmp_path, packing=True, method=method, baseline_size=None if method == "full" else 4, max_steps=2
    )
    assert train(settings, say=lambda line: None)["steps"] == 2
