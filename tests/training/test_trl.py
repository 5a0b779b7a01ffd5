"""TRL's plain trainers on `as_peft(model)`: step by step what they do with PEFT's own DoRA model, saved, resumed, reloaded."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import randomize, tiny_llama
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

import doratune
from doratune import AdapterConfig

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
from datasets import Dataset  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
CONFIG = AdapterConfig(rank=2, targets=["q_proj", "v_proj"])
PAIRS = [
    {"prompt": f"is {i} true", "chosen": f"the correct answer is true{i}", "rejected": f"answer{i} false ending4"} for i in range(8)
]
DATA = {
    "sft": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS],
    "dpo": PAIRS,
    "kto": [
        {"prompt": r["prompt"], "completion": r[("rejected", "chosen")[i % 2]], "label": i % 2 == 1} for i, r in enumerate(PAIRS)
    ],
    "reward": [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in PAIRS],
    "grpo": [{"prompt": row["prompt"]} for row in PAIRS],
}
DATA["rloo"] = DATA["grpo"]


def vowels(completions, **_):
    return [sum(text.count(v) for v in "aeiou") / (1 + len(text)) for text in completions]


SAMPLED = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1, "temperature": 1.0}
OWN = {
    "dpo": {"max_length": 64},
    "kto": {"max_length": 64},
    "sft": {"max_length": 64},
    "reward": {"max_length": 64},
    "grpo": SAMPLED,
    "rloo": SAMPLED,
}
CLASSES = {name: getattr(trl, f"{name.upper() if name != 'reward' else 'Reward'}Trainer", None) for name in OWN}


def trainer_of(method, model, folder, tokenizer, ref_model=None, **settings):
    cls = CLASSES[method]
    config = getattr(trl, cls.__name__.replace("Trainer", "Config"))
    common = {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no"}
    quiet = {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "dataloader_pin_memory": False, "seed": 3}
    arguments = config(str(folder), **common | quiet | {"gradient_checkpointing": False} | OWN[method] | settings)
    more = {"reward_funcs": vowels} if method in ("grpo", "rloo") else {} if ref_model is None else {"ref_model": ref_model}
    return cls(model=model, args=arguments, train_dataset=Dataset.from_list(DATA[method]), processing_class=tokenizer, **more)


def losses(trainer):
    return [
        {k: v for k, v in row.items() if k in ("loss", "kl", "reward", "rewards/margins")} for row in trainer.state.log_history[:-1]
    ]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scoring_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("scoring")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForSequenceClassification(
        LlamaConfig(vocab_size=300, num_hidden_layers=2, num_labels=1, pad_token_id=0, eos_token_id=2, bos_token_id=1, **sizes)
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def base(base_folder, scoring_folder):
    def load(method):
        if method == "reward":
            return AutoModelForSequenceClassification.from_pretrained(scoring_folder)
        return AutoModelForCausalLM.from_pretrained(base_folder)

    return load


def config_of(method):
    return AdapterConfig(rank=2, targets=["q_proj", "v_proj"], also_train=["score"]) if method == "reward" else CONFIG


@pytest.fixture
def adapter(base, tmp_path):
    """A folder of an adapter that was trained before, or of a fresh one."""

    def write(method, trained=True):
        model = doratune.attach(base(method), config_of(method))
        doratune.save(randomize(model, scale=0.1) if trained else model, tmp_path / "adapter", format="peft")
        return tmp_path / "adapter"

    return write


@pytest.mark.parametrize("trained", [True, False], ids=["next stage", "fresh"])
@pytest.mark.parametrize("method", OWN)
def test_step_by_step_as_peft(method, trained, base, adapter, tmp_path, tiny_tokenizer):
    folder = adapter(method, trained)
    theirs = peft.PeftModel.from_pretrained(base(method), folder, is_trainable=True)
    expected = trainer_of(method, theirs, tmp_path / "theirs", tiny_tokenizer)
    expected.train()
    model = doratune.load(base(method), folder, trainable=True)
    ours = trainer_of(method, doratune.as_peft(model), tmp_path / "ours", tiny_tokenizer)
    assert getattr(ours, "ref_model", None) is None  # no second base
    ours.train()
    assert len(losses(ours)) == 3
    for mine, other in zip(losses(ours), losses(expected), strict=True):
        assert mine == pytest.approx(other, rel=2e-3, abs=2e-5)
    if method == "dpo":
        assert losses(ours)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert doratune.names(model) == (["default"] if method in ("sft", "reward") else ["default", "ref"])
    if method not in ("sft", "reward"):  # the reference is what it was
        doratune.use(model, "ref")
        doratune.save(model, tmp_path / "ref")
        before, after = (doratune.load(base(method), path) for path in (folder, tmp_path / "ref"))
        ids = torch.arange(3, 15)[None]
        assert torch.equal(before(ids).logits, after(ids).logits)


@pytest.mark.parametrize("method", OWN)
def test_saved_resumed_and_reloaded(method, base, adapter, tmp_path, tiny_tokenizer):
    folder = adapter(method)

    def run(where, resume=None):
        model = doratune.load(base(method), folder, trainable=True)
        trainer = trainer_of(method, doratune.as_peft(model), where, tiny_tokenizer, save_strategy="steps", save_steps=1)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, model

    trainer, model = run(tmp_path / "run")
    again, other = run(tmp_path / "again", str(tmp_path / "run" / "checkpoint-2"))
    trained, reference = model.state_dict(), doratune.names(model)[1:]
    assert all(torch.equal(t, trained[key]) for key, t in other.state_dict().items())
    assert [row for row in losses(again) if row][-1] == losses(trainer)[-1]
    trainer.save_model(str(tmp_path / "saved"))
    assert sorted(p.name for p in (tmp_path / "saved").iterdir() if p.is_dir()) == reference
    ids = torch.arange(3, 15)[None]
    expected = model.eval()(ids).logits
    assert torch.equal(doratune.load(base(method), tmp_path / "saved").eval()(ids).logits, expected)
    in_peft = peft.PeftModel.from_pretrained(base(method), tmp_path / "saved").eval()
    torch.testing.assert_close(in_peft(ids).logits, expected, rtol=1e-4, atol=1e-5)
    for left in (model, other):
        doratune.use(left, None)
        assert torch.equal(left.eval()(ids).logits, base(method).eval()(ids).logits)  # nothing of the base was touched


def test_the_best_checkpoint_is_taken(base, adapter, tmp_path, tiny_tokenizer):
    model = doratune.as_peft(doratune.load(base("dpo"), adapter("dpo"), trainable=True))
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}  # the worst: the first
    arguments = trl.DPOConfig(
        str(tmp_path / "run"), max_steps=3, learning_rate=1e-2, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
        gradient_checkpointing=False, **settings, **best,
    )  # fmt: skip
    rows = Dataset.from_list(PAIRS)
    trainer = trl.DPOTrainer(model, args=arguments, train_dataset=rows, eval_dataset=rows, processing_class=tiny_tokenizer)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    ids = torch.arange(3, 15)[None]
    first = doratune.load(base("dpo"), tmp_path / "run" / "checkpoint-1")
    assert torch.equal(model.eval()(ids).logits, first.eval()(ids).logits)
    trainer.create_model_card()
    assert "dpo" in (tmp_path / "run" / "README.md").read_text().lower()


@pytest.fixture
def quantized(tmp_path):
    """Loads an nf4 base."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, num_hidden_layers=1, pad_token_id=0, eos_token_id=2, **sizes)).save_pretrained(
        tmp_path / "base"
    )
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=nf4)


@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize("view", [True, False], ids=["as_peft", "bare"])
def test_a_quantized_base_keeps_its_adapter_in_fp32(method, view, quantized, tmp_path, tiny_tokenizer):
    """TRL puts what is trained over such a base into bf16."""
    model = doratune.attach(quantized(), AdapterConfig(rank=2, also_train=["norm"]))
    start = model.model.layers[0].self_attn.q_proj.magnitude.detach().clone()
    settings = {"learning_rate": 1e-5, "precompute_ref_log_probs": True} if method == "dpo" else {"learning_rate": 1e-5}
    trainer = trainer_of(method, doratune.as_peft(model) if view else model, tmp_path / "run", tiny_tokenizer, **settings)
    trainer.train()
    m = model.model.layers[0].self_attn.q_proj.magnitude
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert 0 < (m - start).abs().max() < 1e-4  # three steps of 1e-5 from the exact start, all below bf16's spacing
    if method == "dpo":
        assert losses(trainer)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_what_attach_returns_need_not_be_named(quantized):
    assert doratune.attach(quantized(), AdapterConfig(rank=2)).train().training


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_trained_magnitude_is_not_rounded(method, quantized, tmp_path, tiny_tokenizer):
    """The next stage over a quantized base: TRL rounds what it does not know for PEFT's m."""
    model = doratune.attach(quantized(), AdapterConfig(rank=2))
    doratune.save(randomize(model, scale=0.1), tmp_path / "adapter")
    m = model.model.layers[0].self_attn.q_proj.magnitude.detach().clone()
    settings = {"precompute_ref_log_probs": True} if method == "dpo" else {}
    bare = doratune.load(quantized(), tmp_path / "adapter", trainable=True)
    with pytest.raises(doratune.UserError, match=r"m of model.layers.0.* was rounded to bfloat16, .* doratune.as_peft\(model\)"):
        trainer_of(method, bare, tmp_path / "bare", tiny_tokenizer, **settings)
    model = doratune.load(quantized(), tmp_path / "adapter", trainable=True)
    trainer_of(method, doratune.as_peft(model), tmp_path / "run", tiny_tokenizer, **settings)
    assert torch.equal(m, model.model.layers[0].self_attn.q_proj.magnitude)


def test_with_the_mixin(base, adapter, tmp_path, tiny_tokenizer):
    """Rates of their own, and checkpoints of the adapter alone."""
    from doratune.training import TrainerMixin

    class DoRADPO(TrainerMixin, trl.DPOTrainer):
        output_factor_lr_ratio = 4.0

    model = doratune.load(base("dpo"), adapter("dpo"), trainable=True)
    arguments = trl.DPOConfig(
        str(tmp_path / "run"), max_steps=2, save_steps=1, learning_rate=1e-3, logging_steps=1, report_to=[], use_cpu=True,
        disable_tqdm=True, gradient_checkpointing=False, weight_decay=0.1, bf16=False,
    )  # fmt: skip
    rows = Dataset.from_list(PAIRS)
    trainer = DoRADPO(doratune.as_peft(model), args=arguments, train_dataset=rows, processing_class=tiny_tokenizer)
    trainer.train()
    assert losses(trainer)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    decays = {group["name"]: group["weight_decay"] for group in trainer.optimizer.param_groups}
    assert decays == {"factors": 0.1, "output_factors": 0.1, "magnitude": 0.0}
    ids = torch.arange(3, 15)[None]
    saved = doratune.load(base("dpo"), tmp_path / "run" / "checkpoint-2")
    assert torch.equal(saved.eval()(ids).logits, model.eval()(ids).logits)


def test_an_adapted_head_that_trl_reads_past_is_refused(base, tmp_path, tiny_tokenizer):
    model = doratune.attach(base("sft"), AdapterConfig(rank=2, targets=["q_proj", "lm_head"]))
    trainer = trainer_of("dpo", doratune.as_peft(model), tmp_path, tiny_tokenizer)
    with pytest.raises(doratune.UserError, match=r"read past its layer, .* lm_head \(by .*\); leave it out \(exclude\)"):
        trainer.train()


def test_the_attached_model_itself_with_references_computed_before(base, adapter, tmp_path, tiny_tokenizer):
    """Without PEFT's class: no second base either."""
    model = doratune.load(base("dpo"), adapter("dpo"), trainable=True)
    model.config._name_or_path = "nowhere"
    trainer = trainer_of("dpo", model, tmp_path / "run", tiny_tokenizer, precompute_ref_log_probs=True)
    assert trainer.ref_model is None
    trainer.train()
    assert losses(trainer)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("method", ["dpo", "kto", "grpo"])
def test_a_base_is_no_reference_of_a_trained_adapter(method, base, adapter, tmp_path, tiny_tokenizer):
    """The attached model itself, which TRL does not know for PEFT's: it loads the base again, by its name."""
    fresh, trained = (doratune.load(base(method), adapter(method, moved), trainable=True) for moved in (False, True))
    trainer = trainer_of(method, fresh, tmp_path / "fresh", tiny_tokenizer)  # its reference is the base
    assert trainer.ref_model is not None and not doratune.names(trainer.ref_model)
    with pytest.raises(doratune.UserError, match=f"the reference of {type(trainer).__name__} would be the base"):
        trainer_of(method, trained, tmp_path / "run", tiny_tokenizer)
    trainer_of("sft", trained, tmp_path / "sft", tiny_tokenizer)  # has no reference


def test_a_reference_of_ones_own(base, adapter, tmp_path, tiny_tokenizer):
    model, reference = (doratune.load(base("dpo"), adapter("dpo"), trainable=trainable) for trainable in (True, False))
    trainer = trainer_of("dpo", model, tmp_path / "run", tiny_tokenizer, ref_model=reference)
    trainer.train()
    assert losses(trainer)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_what_trl_itself_refuses_of_peft_models(base, tmp_path, tiny_tokenizer):
    model = doratune.as_peft(doratune.attach(base("dpo"), CONFIG))
    with pytest.raises(NotImplementedError, match="sync_ref_model"):
        trainer_of("dpo", model, tmp_path, tiny_tokenizer, sync_ref_model=True)
    other = doratune.as_peft(doratune.attach(base("sft"), CONFIG))
    cls = trl.SFTTrainer
    with pytest.raises(ValueError, match="PeftModel"):
        cls(other, args=trl.SFTConfig(str(tmp_path), use_cpu=True, bf16=False), train_dataset=Dataset.from_list(DATA["sft"]),
            processing_class=tiny_tokenizer, peft_config=peft.LoraConfig())  # fmt: skip


def online(folder, model, tokenizer, settings):
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    arguments = OnlineDPOConfig(folder, max_new_tokens=5, **settings)
    rows = Dataset.from_list(DATA["grpo"])
    return OnlineDPOTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, reward_funcs=vowels)


def orpo(folder, model, tokenizer, settings):
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    arguments, rows = ORPOConfig(folder, max_length=64, **settings), Dataset.from_list(PAIRS)
    return ORPOTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)


def gkd(folder, model, tokenizer, settings):
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    turns = [[{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["chosen"]}] for r in PAIRS]
    arguments, rows = (
        GKDConfig(folder, max_length=64, max_new_tokens=5, **settings),
        Dataset.from_list([{"messages": t} for t in turns]),
    )
    return GKDTrainer(model=model, teacher_model=tiny_llama(seed=4), args=arguments, train_dataset=rows, processing_class=tokenizer)


@pytest.mark.parametrize("build", [online, orpo, gkd])
def test_experimental_trainers_step_by_step_as_peft(build, base, adapter, tmp_path, tiny_tokenizer):
    folder, seen = adapter("sft"), {}
    settings = {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no"}
    settings |= {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "seed": 3, "gradient_checkpointing": False}
    for who in ("theirs", "ours"):
        theirs = who == "theirs"
        model = (
            peft.PeftModel.from_pretrained(base("sft"), folder, is_trainable=True)
            if theirs
            else doratune.as_peft(doratune.load(base("sft"), folder, trainable=True))
        )
        trainer = build(str(tmp_path / who), model, tiny_tokenizer, settings)
        trainer.train()
        seen[who] = [row["loss"] for row in trainer.state.log_history[:-1]]
    assert seen["ours"] == pytest.approx(seen["theirs"], rel=2e-3, abs=2e-5)
    assert len(seen["ours"]) == 3


TWO = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import peft, torch
from conftest import small_tokenizer
from transformers import AutoModelForCausalLM
import doratune
import test_trl as here
folder = Path(sys.argv[2])
base = lambda: AutoModelForCausalLM.from_pretrained(folder / "base")
seen = []
for who in ("theirs", "ours"):
    model = (peft.PeftModel.from_pretrained(base(), folder / "adapter", is_trainable=True) if who == "theirs"
             else doratune.as_peft(doratune.load(base(), folder / "adapter", trainable=True)))
    trainer = here.trainer_of("dpo", model, folder / who, small_tokenizer(), per_device_train_batch_size=2)
    trainer.train()
    seen.append([row["loss"] for row in trainer.state.log_history[:-1]])
    trainer.save_model(str(folder / who / "saved"))
if trainer.accelerator.is_main_process:
    (folder / "seen.json").write_text(json.dumps({"losses": seen, "processes": trainer.accelerator.num_processes}))
"""


def test_two_processes(base, adapter, tmp_path):
    """DPO under DistributedDataParallel: the reference is switched to beside what the wrapper was made around."""
    adapter("dpo")
    base("dpo").save_pretrained(tmp_path / "base")
    (tmp_path / "two.py").write_text(TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(tmp_path / "two.py")]
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*paths, *sys.path])}
    run = subprocess.run(
        [*launch, str(Path(__file__).parent), str(tmp_path)], capture_output=True, text=True, timeout=600, env=environment
    )
    assert run.returncode == 0, run.stderr[-3000:]
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["processes"] == 2
    theirs, ours = seen["losses"]
    assert ours == pytest.approx(theirs, rel=2e-3)
    assert ours[0] == pytest.approx(math.log(2), abs=1e-5)
    again = doratune.load(base("dpo"), tmp_path / "ours" / "saved")
    theirs = peft.PeftModel.from_pretrained(base("dpo"), tmp_path / "theirs" / "saved")
    ids = torch.arange(3, 15)[None]
    torch.testing.assert_close(again(ids).logits, theirs(ids).logits, rtol=1e-2, atol=1e-3)
