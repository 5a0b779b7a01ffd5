"""The plain classes of transformers on an attached model: what decays, quantized bases, gradient checkpointing."""

import copy
import pickle

import pytest
import torch
from conftest import randomize, tiny_gpt2, tiny_llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import doratune
from doratune import AdapterConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*lora_dropout.*:UserWarning")


def rows(count=8, vocabulary=60):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, vocabulary, (8,), generator=generator) for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer_of(model, folder, **settings):
    settings = {"max_steps": 2, "learning_rate": 1e-2, "weight_decay": 0.5, "save_strategy": "no"} | settings
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        remove_unused_columns=False, label_names=["labels"], **settings,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=rows())


def decays(trainer, model):
    """Names of the trained parameters that decay, and of those that do not."""
    decayed = {id(p): group["weight_decay"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    named = {name: decayed[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    return {n for n, decay in named.items() if decay}, {n for n, decay in named.items() if not decay}


CONFIGS = {
    "dora": AdapterConfig(rank=2),
    "relative": AdapterConfig(rank=2, magnitude_form="relative"),
    "input axis": AdapterConfig(rank=2, magnitude_axis="input"),
    "vera": AdapterConfig(method="dvora", rank=4),
    "loha": AdapterConfig(method="dloha", rank=2),
    "magnitude alone": AdapterConfig(rank=2, targets=["q_proj"], magnitude_only=["up_proj"]),
    "an embedding": AdapterConfig(rank=2, targets=["embed_tokens"]),
}
WAYS = {
    "attached": lambda model: model,
    "a copy": copy.deepcopy,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "detached and used again": lambda model: doratune.use(doratune.use(model, None), "default"),
    "merged and unmerged": lambda model: (doratune.merge(model), doratune.unmerge(model), model)[-1],
    "compiled": lambda model: torch.compile(model, backend="eager"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_m_does_not_decay(name, tmp_path):
    model = doratune.attach(tiny_llama(), CONFIGS[name])
    decayed, spared = decays(trainer_of(model, tmp_path), model)
    assert spared == {n for n, p in model.named_parameters() if "magnitude" in n and p.requires_grad}
    assert spared
    assert decayed or name == "magnitude alone"


@pytest.mark.parametrize("way", WAYS)
def test_however_the_model_came_about(way, tmp_path):
    model = WAYS[way](doratune.attach(tiny_gpt2(), CONFIGS["dora"]))
    decayed, spared = decays(trainer_of(model, tmp_path), model)
    assert {n.rpartition(".")[2] for n in spared} == {"magnitude"}
    assert {n.rpartition(".")[2] for n in decayed} == {"lora_A", "lora_B"}
    assert {type(key) for key in model.state_dict()} == {str}  # nothing of this is in a file


def test_of_experts(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=64, num_hidden_layers=1, num_local_experts=2, **sizes))
    doratune.attach(model, AdapterConfig(rank=2, targets=["experts"]))
    decayed, spared = decays(trainer_of(model, tmp_path), model)
    assert spared == {n for n, p in model.named_parameters() if "magnitude" in n and p.requires_grad}
    assert {n.rpartition(".")[2] for n in decayed} == {"lora_A", "lora_B"}


def test_without_gradients_m_stays_where_it_is(tmp_path):
    """A decay of 0.5 a step on m itself would show."""
    model = randomize(doratune.attach(tiny_llama(), CONFIGS["dora"]))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = trainer_of(model, tmp_path, learning_rate=0.1).create_optimizer()
    for name in before:
        model.get_parameter(name).grad = torch.zeros_like(before[name])
    optimizer.step()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], p) == ("magnitude" in n) for n, p in before.items())


@pytest.fixture(scope="module")
def nf4(tmp_path_factory):
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **sizes)).save_pretrained(folder)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return lambda: AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings)


def test_a_quantized_base_is_trained_by_the_plain_class(nf4, tmp_path):
    plain = nf4()
    with pytest.raises(ValueError, match="purely quantized"):
        trainer_of(plain, tmp_path)
    model = doratune.attach(plain, CONFIGS["dora"])
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer_of(model, tmp_path, save_strategy="steps", save_steps=1).train()
    assert all(not torch.equal(model.get_parameter(n), p) for n, p in before.items())
    again = trainer_of(doratune.attach(nf4(), CONFIGS["dora"]), tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(again.model.get_parameter(n), model.get_parameter(n)) for n in before)
    doratune.detach(model)
    with pytest.raises(ValueError, match="purely quantized"):
        trainer_of(model, tmp_path)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, tmp_path):
    losses = []
    for settings in ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}):
        model = doratune.attach(tiny_llama(), CONFIGS["dora"])
        losses.append(trainer_of(model, tmp_path, **settings).train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
