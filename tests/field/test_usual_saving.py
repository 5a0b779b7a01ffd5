"""The usual ways of saving an attached model: the adapter is written, or the call is refused; never the base alone."""

import copy
import json
import pickle

import pytest
import torch
from conftest import randomize, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import doratune
from doratune import AdapterConfig
from doratune.errors import UserError

IDS = torch.arange(3, 15)[None]
CONFIG = AdapterConfig(rank=4, also_train=["norm"])


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture
def base(base_folder):
    return lambda: AutoModelForCausalLM.from_pretrained(base_folder).eval()


def test_save_pretrained_writes_the_adapter_and_from_pretrained_reads_it(base, tmp_path):
    model = randomize(doratune.attach(base(), CONFIG))
    with torch.no_grad():
        model.model.norm.weight.mul_(1.2)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(doratune.load(base(), tmp_path)), expected)
    other = base()
    other.load_adapter(str(tmp_path))  # of transformers, which wants the magnitude's key as it is here
    torch.testing.assert_close(logits(other.eval()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_saves_its_own_adapter(how, base, tmp_path):
    model = randomize(doratune.attach(base(), CONFIG))
    other = randomize(how(model), seed=7)
    other.save_pretrained(tmp_path)
    del model
    assert torch.equal(logits(doratune.load(base(), tmp_path)), logits(other))
    doratune.detach(other)
    other.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()), logits(base()))


def test_after_merge_it_writes_the_merged_weights_and_after_unmerge_the_adapter(base, tmp_path):
    model = randomize(doratune.attach(base(), CONFIG))
    expected = logits(model)
    doratune.merge(model)
    model.save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    doratune.unmerge(model)
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_a_model_without_a_name_says_so(tmp_path):
    model = doratune.attach(tiny_llama(), CONFIG)
    with pytest.warns(UserWarning, match=r"from_pretrained cannot find it, doratune\.load"):
        model.save_pretrained(tmp_path)
    assert doratune.load(tiny_llama(), tmp_path)


def test_other_ranks_write_nothing(base, tmp_path):
    model = doratune.attach(base(), CONFIG)
    model.save_pretrained(tmp_path / "a", is_main_process=False)
    with pytest.raises(UserError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "a", push_to_hub=True)
    assert not (tmp_path / "a").exists()


class Holder(nn.Module):
    """A model of one's own around one of transformers', with save_pretrained and save: as of SentenceTransformer."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, labels=None):
        return self.inner(input_ids=input_ids, labels=labels)

    def save_pretrained(self, folder):
        self.inner.save_pretrained(folder)

    save = save_pretrained


class Plain(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, labels=None):
        return self.inner(input_ids=input_ids, labels=labels)


def test_what_would_write_the_base_alone_is_refused(base, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    image = diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",)
    )
    holder, plain = Holder(base()), Plain(base())
    calls = [
        (image, image.save_pretrained),
        (holder, holder.save_pretrained),
        (holder, holder.save),
        (holder, holder.inner.save_pretrained),
        (plain, plain.inner.save_pretrained),
    ]
    for model, call in calls:
        doratune.attach(model, AdapterConfig(rank=2, targets=["to_q"] if model is image else ["q_proj"]))
        owner, name = call.__self__, call.__name__
        with pytest.raises(UserError, match=r"without its adapter; call doratune\.save\(model, folder\), or doratune\.merge"):
            getattr(owner, name)(tmp_path / "base")
        assert not (tmp_path / "base").exists()
        doratune.merge(model)
        getattr(owner, name)(tmp_path / "merged")
        doratune.unmerge(model)
        doratune.detach(model)
        assert getattr(owner, name).__self__ is owner


def items():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 300, (8,), generator=generator) for _ in range(12)]
    return [{"input_ids": row, "labels": row} for row in rows]


def trained(model, folder, resume=None, **settings):
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=50,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,
        **settings,
    )
    trainer = Trainer(model, arguments, train_dataset=items(), eval_dataset=items()[:4])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture
def _not_compiled():
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.usefixtures("_not_compiled")
@pytest.mark.parametrize("kind", ["transformers", "compiled", "a model of one's own"])
def test_a_plain_trainer_resumes_and_takes_the_best(kind, base, tmp_path):
    wrap = {
        "transformers": lambda model: model,
        "compiled": lambda model: torch.compile(model, backend="eager"),
        "a model of one's own": Plain,
    }[kind]
    build = lambda: doratune.attach(wrap(base()), CONFIG)  # noqa: E731

    def parameters(model):
        return [p.detach().clone() for p in model.parameters() if p.requires_grad]

    whole = build()
    trained(whole, tmp_path / "run")
    resumed = build()
    trained(resumed, tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-4"))
    assert all(torch.equal(a, b) for a, b in zip(parameters(whole), parameters(resumed), strict=True))
    best = build()
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    trainer = trained(best, tmp_path / "best", greater_is_better=True, **settings)  # the worst: the first checkpoint
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    again = build()
    trained(again, tmp_path / "again", max_grad_norm=1.0)
    first = build()
    trained(first, tmp_path / "best", resume=str(tmp_path / "best" / "checkpoint-2"))
    assert not all(torch.equal(a, b) for a, b in zip(parameters(best), parameters(again), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(parameters(first), parameters(again), strict=True))
    if kind == "transformers":
        checkpoint = tmp_path / "run" / "checkpoint-6"
        assert json.loads((checkpoint / "adapter_config.json").read_text())["base_model_name_or_path"]
        torch.testing.assert_close(logits(doratune.load(base(), checkpoint)), logits(whole.eval()))
