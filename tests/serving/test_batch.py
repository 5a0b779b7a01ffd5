"""Rows that come and go at any time are what they are alone: memories of several model families, all adapters, draws, failures."""

import random
import threading

import pytest
import torch
from conftest import randomize, small_tokenizer, tiny_gpt2, tiny_llama

import doratune
from doratune import UserError
from doratune.generation.adapters import NamedAdapters
from doratune.serving.batch import Batch, Job, check, opened
from doratune.serving.choosing import Chooser, next_tokens
from doratune.serving.engine import Engine, EngineEnded, QueueFull
from doratune.serving.words import Words

TOKENIZER = small_tokenizer()
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
SMALL = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4} | ENDS


def tiny(family):
    """A tiny model of a family; its sliding windows are four tokens."""
    import transformers as t

    torch.manual_seed(0)
    two = {"num_key_value_heads": 2, "max_position_embeddings": 128}
    models = {
        "llama": tiny_llama,
        "gpt2": tiny_gpt2,
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**SMALL, **two)),
        "gemma3": lambda: t.Gemma3ForCausalLM(
            t.Gemma3TextConfig(**SMALL, **two, head_dim=8, sliding_window=4, layer_types=KINDS)
        ),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**SMALL, **two, sliding_window=4)),
        "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(**ENDS, vocab_size=300, hidden_size=32, n_layer=2, n_head=4)),
    }  # fmt: skip
    return models[family]().eval()


def with_adapters(model):
    for seed, name in enumerate(("a", "b")):
        doratune.attach(model, doratune.AdapterConfig(rank=3, targets="all-linear"), name=name)
        randomize(model, seed)
    return model


def job(ids, adapter, longest, heard=None, **chooser):
    said = [] if heard is None else heard
    return Job(ids, adapter, Chooser(**chooser), Words(TOKENIZER), longest, lambda text, finish: said.append((text, finish)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma3", "mistral", "bloom"])
def test_rows_that_come_and_go(family):
    """Five at a time of fourteen prompts, in three adapters: each row's tokens are those of `generate` alone."""
    model, generator = with_adapters(tiny(family)), random.Random(0)
    asked = [
        (
            [generator.randrange(3, 300) for _ in range(generator.randint(1, 12))],
            generator.choice(["a", "b", None]),
            generator.randint(1, 9),
        )
        for _ in range(14)
    ]
    jobs = [job(ids, adapter, new) for ids, adapter, new in asked]
    with torch.no_grad(), doratune.mixed(model, ["a", "b"]) as way:
        batch, waiting = Batch(model, TOKENIZER, way), list(jobs)
        check(batch, [None, "a", "b"])
        batch.ends = frozenset()  # every answer has its whole length
        while waiting or batch.jobs:
            if waiting and len(batch.jobs) < 5:
                coming, waiting = waiting[: 5 - len(batch.jobs)], waiting[5 - len(batch.jobs) :]
                batch.admit(coming)
            if batch.jobs:
                batch.step()
        assert len(batch.memory) == 0
    for one, (ids, adapter, new) in zip(jobs, asked, strict=True):
        doratune.use(model, adapter)
        prompt = torch.tensor([ids])
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert one.words.ids == out[0, len(ids) :].tolist() and one.finish == "length"


def test_columns_that_nobody_needs_go():
    model = tiny("llama")
    with doratune.mixed(model, [None]) as way:
        batch = Batch(model, TOKENIZER, way)
        batch.admit([job([5] * 60, None, 2), job([6] * 3, None, 50)])
        assert batch.memory.mask.shape == (2, 60)
        batch.step()  # the long one is done
        assert batch.memory.mask.shape == (1, 4) and len(batch.jobs) == 1
        batch.jobs[0].gone = True
        batch.drop()
        assert len(batch.memory) == 0 and batch.memory.cache is None


def test_models_whose_rows_cannot_be_told_apart_are_refused():
    from transformers import MambaConfig, MambaForCausalLM, OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    mamba = MambaForCausalLM(MambaConfig(**ENDS, vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()
    with doratune.mixed(mamba, [None]) as way, pytest.raises(UserError, match="rows of a batch of MambaForCausalLM are not what"):
        check(Batch(mamba, TOKENIZER, way), [None, None, None])

    sizes = {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 128, "num_attention_heads": 4}
    opt = with_adapters(OPTForCausalLM(OPTConfig(**ENDS, **sizes, **{k: SMALL[k] for k in ("vocab_size", "hidden_size")})).eval())
    with doratune.mixed(opt, ["a", "b"]) as way, pytest.raises(UserError, match="the batch has 2 examples, chosen names 1"):
        check(Batch(opt, TOKENIZER, way), [None, "a", "b"])  # its layers get tokens in a row

    class Mixing(torch.nn.Module):  # each row sees the others
        def forward(self, x):
            return x + x.mean(0, keepdim=True)

    llama = tiny("llama")
    llama.model.norm = torch.nn.Sequential(llama.model.norm, Mixing())
    with doratune.mixed(llama, [None]) as way, pytest.raises(UserError, match="scores differ by"):
        check(Batch(llama, TOKENIZER, way), [None, None, None])


def test_adapters_that_train_whole_modules_are_refused(tmp_path, tiny_folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    doratune.attach(model, doratune.AdapterConfig(rank=2, targets=["q_proj"], also_train=["lm_head"]))
    doratune.save(model, tmp_path / "whole")
    with (
        pytest.raises(UserError, match=r"adapter 'whole' trains whole modules .* doratune merge"),
        opened(NamedAdapters(str(tiny_folder), [str(tmp_path / "whole")])),
    ):
        pass


def test_draws_follow_the_scores():
    scores = torch.tensor([[0.0, 1.0, 2.0, -1e4]]).log_softmax(-1).expand(1500, -1)

    def shares(**settings):
        tokens = next_tokens(scores, [Chooser(seed=i, **settings) for i in range(1500)])
        return torch.bincount(torch.tensor(tokens), minlength=4) / 1500

    want = scores[0].softmax(-1)
    assert (shares(temperature=1.0) - want).abs().max() < 0.06
    assert (shares(temperature=2.0) - (scores[0] / 2).softmax(-1)).abs().max() < 0.06
    narrow = shares(temperature=1.0, top_p=0.7)
    assert narrow[0] == narrow[3] == 0 and abs(narrow[2] - want[2] / (want[1] + want[2])) < 0.06
    assert shares(temperature=0.0)[2] == shares(temperature=1e-7)[2] == 1
    assert next_tokens(torch.tensor([[0.0, torch.nan], [0.0, 1.0]]), [Chooser(), Chooser()]) == [None, 1]


@pytest.fixture
def engine(tiny_folder, tmp_path):
    """Two rows, three that may wait."""
    engine = Engine(NamedAdapters(str(tiny_folder)), 2, 3)
    engine.start()
    yield engine
    engine.stop()
    assert not engine.alive


class Heard:
    """What an answer says, and when it ends."""

    def __init__(self):
        self.said, self.over = [], threading.Event()

    def append(self, item):
        self.said.append(item)
        if item[1]:
            self.over.set()

    @property
    def finish(self):
        assert self.over.wait(60)
        return self.said[-1][1]


def test_a_pass_that_fails_fails_its_rows_alone(engine, capfd):
    long, bad, after = Heard(), Heard(), Heard()
    engine.submit([job([5, 6], None, 200, long), job([5, 9_999], None, 5, bad)])  # the second has a token that the model has not
    assert bad.finish == "failed" and "the model failed" in bad.said[-1][0]
    engine.submit([job([5, 6], None, 5, after)])
    assert after.finish == "length" and long.finish in ("length", "stop")
    assert "IndexError" in capfd.readouterr().err


def test_what_waits_is_bounded_and_given_up(engine):
    heard = [Heard() for _ in range(5)]
    jobs = [job([5, 6], None, 200, one) for one in heard]
    engine.submit(jobs)
    with pytest.raises(QueueFull):
        engine.submit([job([5], None, 1) for _ in range(4)])
    engine.give_up(jobs[2:])
    assert {heard[0].finish, heard[1].finish} <= {"length", "stop"}
    assert not any(one.over.is_set() for one in heard[2:])


def test_the_end_fails_what_is_left(engine):
    heard = [Heard() for _ in range(5)]
    engine.submit([job([5, 6], None, 250, one) for one in heard])
    engine.stop()
    assert {one.finish for one in heard} <= {"failed", "length", "stop"} and heard[4].finish == "failed"
    with pytest.raises(EngineEnded):
        engine.submit([job([5], None, 1)])


def test_a_thread_that_dies_says_so(engine, capfd, monkeypatch):
    heard = Heard()
    monkeypatch.setattr(Batch, "drop", lambda self: 1 / 0)  # a fault of our own, where no pass of the model is
    engine.submit([job([5, 6], None, 3, heard)])
    assert heard.finish == "failed"
    engine.thread.join(60)
    with pytest.raises(EngineEnded):
        engine.submit([job([5], None, 1)])
    assert "ZeroDivisionError" in capfd.readouterr().err and not engine.alive
