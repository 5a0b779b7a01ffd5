"""Protocol `paper`: its settings, which part of an output counts, nothing from the checkpoint's generation config; batches."""

import json
from functools import partial
from operator import itemgetter

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama
from transformers import GenerationConfig

from doratune.cli.main import main
from doratune.data.published_prompts import evaluation_prompt
from doratune.errors import UserError
from doratune.evaluation import paper as paper_file
from doratune.evaluation import prefix
from doratune.evaluation.evaluate import evaluate
from doratune.evaluation.generate import generate
from doratune.evaluation.kinds.commonsense import first_answer
from doratune.evaluation.likelihood import likelihood
from doratune.evaluation.paper import last_response, paper
from doratune.evaluation.summary import add_published, summarize
from doratune.evaluation.tasks import load_task
from doratune.support.models import load_model, load_tokenizer


def silent(n):
    pass


def items(count):
    """Prompts of many lengths, all five kinds of answers."""
    kinds = [
        ("true", "true/false"),
        ("answer2", "answer1/answer2/answer3"),
        ("solution1", "solution1/solution2"),
        ("option2", "option1/option2"),
        ("ending3", "ending1/ending2/ending3/ending4"),
    ]
    return [
        {"instruction": f"Number {i}{', and so on' * (i % 5)}?\n\nAnswer format: {form}", "input": "", "answer": answer}
        for i, (answer, form) in enumerate(kinds[i % 5] for i in range(count))
    ]


def writer():
    """A tiny model whose outputs differ between prompts."""
    model = tiny_llama(seed=3)
    for parameter in model.parameters():
        parameter.data.mul_(4)
    return model


PROTOCOLS = {
    "generate": lambda *rest: generate(*rest, 1, 8, silent),
    "paper": lambda *rest: paper(*rest, silent),
    "likelihood": lambda *rest: likelihood(*rest, silent),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_one_at_a_time_is_a_batch_of_32(protocol, tiny_tokenizer, monkeypatch):
    """Every verdict and every output; the outputs differ between the items, so that equality says something."""
    monkeypatch.setitem(paper_file.SETTINGS, "max_new_tokens", 8)
    model, entries = writer(), items(35)
    one, many = (PROTOCOLS[protocol](model, tiny_tokenizer, entries, size) for size in (1, 32))
    for a, b in zip(one, many, strict=True):
        assert {k: v for k, v in a.items() if k != "scores"} == {k: v for k, v in b.items() if k != "scores"}
        assert a.get("scores", {}) == pytest.approx(b.get("scores", {}), abs=1e-3)
    assert len({r["output"] for r in one}) > 5


def test_the_real_model_one_at_a_time_and_in_batches(smollm2, shared_data, monkeypatch):
    """SmolLM2 in float32 on published items of two tasks, by all protocols."""
    monkeypatch.setitem(paper_file.SETTINGS, "max_new_tokens", 5)
    model, tokenizer, files = load_model(smollm2), load_tokenizer(smollm2), shared_data / "commonsense"
    entries = [e for task in ("boolq", "ARC-Easy") for e in load_task(str(files / task / "test.json"), limit=4)[1]]
    for protocol in PROTOCOLS:
        one, eight = (PROTOCOLS[protocol](model, tokenizer, entries, size) for size in (1, 8))
        for a, b in zip(one, eight, strict=True):
            assert {k: v for k, v in a.items() if k != "scores"} == {k: v for k, v in b.items() if k != "scores"}
            assert a.get("scores", {}) == pytest.approx(b.get("scores", {}), abs=2e-3)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_beams_share_the_prompts_prefix(make, tiny_tokenizer, monkeypatch):
    """The prompt runs once, not once a beam, and says the same as when each beam runs it."""
    model, entries, rows = make(), items(6), []
    for parameter in model.parameters():
        parameter.data.mul_(4)
    model.register_forward_hook(lambda module, given, kwargs, out: rows.append(kwargs["input_ids"].shape), with_kwargs=True)
    run = partial(generate, model, tiny_tokenizer, entries, 6, 4, 8, silent, prompt_of=itemgetter("instruction"))
    shared = run()
    assert rows[0][0] == 6 and rows[0][1] > 20 and set(rows[1:]) == {(24, 1)}
    monkeypatch.setattr(prefix, "for_beams", lambda *_: {})
    rows.clear()
    assert run() == shared
    assert rows[0][0] == 24 and rows[0][1] > 20
    assert len({r["output"] for r in shared}) > 2


def test_a_memory_of_another_kind_is_left_to_transformers():
    """A sliding window keeps less than all tokens."""
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    ids = torch.ones(2, 5, dtype=torch.long)
    for window, shares in ((None, True), (4, False)):
        model = MistralForCausalLM(MistralConfig(vocab_size=30, sliding_window=window, **sizes)).eval()
        with torch.no_grad():
            assert bool(prefix.for_beams(model, ids, ids, 4)) == shares
            assert prefix.for_beams(model, ids, ids, 1) == {}


def test_what_reaches_the_model(tiny_tokenizer, monkeypatch):
    """The published prompt, left-padded under a mask, 4 beams, 32 tokens, no sampling, explicit special tokens, no early stop."""
    model, calls = tiny_llama(), []
    whole = type(model).generate

    def spy(self, **given):
        calls.append(given)
        return whole(self, **given)

    monkeypatch.setattr(type(model), "generate", spy)
    entries = items(3)
    records = paper(model, tiny_tokenizer, entries, 3, silent)
    (call,) = calls
    settings = call["generation_config"]
    assert (settings.num_beams, settings.max_new_tokens, settings.do_sample) == (4, 32, False)
    assert (settings.eos_token_id, settings.pad_token_id) == (2, 0)
    assert not call.get("stopping_criteria")
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(call["input_ids"], call["attention_mask"])]
    expected = sorted((tiny_tokenizer(evaluation_prompt(e))["input_ids"] for e in entries), key=len, reverse=True)
    assert prompts == expected
    assert call["attention_mask"][:, -1].all() and not call["attention_mask"][-1, 0]
    assert [r["prompt"] for r in records] == [evaluation_prompt(e) for e in entries]
    assert all(r["prompt"].endswith("### Response:\n                ") for r in records)


@pytest.mark.parametrize("protocol", ["generate", "paper"])
def test_the_checkpoints_generation_config_changes_nothing(protocol, tiny_tokenizer):
    """What a call leaves open, transformers takes from the checkpoint: sampling, penalties, forced and forbidden tokens."""
    model, entries = writer(), items(6)
    plain = PROTOCOLS[protocol](model, tiny_tokenizer, entries, 6)
    theirs = GenerationConfig(
        do_sample=True,
        temperature=5.0,
        top_p=0.9,
        num_beams=2,
        repetition_penalty=3.0,
        no_repeat_ngram_size=1,
        length_penalty=-5.0,
        max_length=3,
        suppress_tokens=list(range(3, 200)),
        eos_token_id=[5, 6],
    )
    model.generation_config = theirs
    assert PROTOCOLS[protocol](model, tiny_tokenizer, entries, 6) == plain
    assert model.generation_config is theirs


def test_what_follows_the_last_heading_is_searched():
    """As the DoRA authors' script splits the whole text; then the first match, wherever it stands, whatever its case is not."""
    cases = [
        ("the correct answer is true", "true", "true"),
        ("true ### Response:\n false", "true", "false"),
        ("true\n\n### Response:\n", "true", None),
        ("a ### Response: b ### Response: answer2 answer1", "answer1", "answer2"),
        ("### response: true", "true", "true"),
        ("True, not false", "true", "false"),
        ("untrue", "true", "true"),
        ("answer5", "answer1", "answer5"),
        ("answer10", "answer1", "answer1"),
    ]
    for text, gold, expected in cases:
        assert first_answer(last_response(text), {"instruction": "", "answer": gold}) == expected, text


def test_the_verdict_is_on_that_part(tiny_tokenizer, monkeypatch):
    """The whole output is recorded, also where an answer before another heading does not count."""
    model, text = tiny_llama(), "true ### Response: false"
    monkeypatch.setattr(type(tiny_tokenizer), "batch_decode", lambda self, rows, **_: [text] * len(rows))
    (record,) = paper(model, tiny_tokenizer, items(1), 1, silent)
    assert (record["output"], record["answer"], record["gold"], record["correct"]) == (text, "false", "true", False)
    (record,) = generate(model, tiny_tokenizer, items(1), 1, 1, 4, silent)
    assert record["answer"] == "true" and record["correct"]


def test_published_figures_stand_beside_paper_and_generate():
    records = [{"correct": True, "correct_normalized": True, "answer": "true"}]
    entry = {"instruction": "Answer format: true/false", "answer": "true"}
    for protocol, shown in (("paper", True), ("generate", True), ("likelihood", False)):
        result = add_published(summarize("boolq", [entry], records, protocol, 1.0), "llama-7b", "dora", 32)
        assert ("published" in result) == shown


@pytest.mark.parametrize("given", [{"beams": 1}, {"beams": 5}, {"max_new_tokens": 16}])
def test_its_settings_are_fixed(given, tiny_tokenizer):
    (name, value), run = *given.items(), partial(evaluate, tiny_llama(), tiny_tokenizer, [("t", items(1))])
    with pytest.raises(UserError, match=f"{name} is {value}, but protocol paper has {name} "):
        run(("paper",), **given)
    with pytest.raises(UserError, match="drop it, or use --protocol generate"):
        run(("generate", "paper"), **given)
    assert run(("paper",), beams=4, max_new_tokens=32)["results"][0]["protocol"] == "paper"


def test_command_line(tiny_folder, tmp_path, capsys):
    task = tmp_path / "mixed.json"
    task.write_text(json.dumps(items(3)))
    common = ["evaluate", "--model", str(tiny_folder), "--task", str(task)]
    for protocol, expected in (("paper", ["paper"]), ("all", ["generate", "likelihood", "paper"])):
        output = tmp_path / protocol
        assert main([*common, "--protocol", protocol, "--output", str(output), "--json"]) == 0
        printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
        assert [r["protocol"] for r in printed["results"]] == expected
        assert sorted(p.name for p in output.glob("*.jsonl")) == sorted(f"mixed.{p}.jsonl" for p in expected)
    for options, noted in ((["bfloat16"], True), (["bfloat16", "--batch_size", "1"], False), (["float32"], False)):
        run = [*common, "--protocol", "likelihood", "--overwrite", "--output", str(tmp_path / "paper"), "--dtype", *options]
        assert main(run) == 0
        assert ("rounding makes single verdicts depend on the batch size" in capsys.readouterr().out) == noted
    for wrong, message in (
        (["--protocol", "paper", "--beams", "2"], "beams is 2, but protocol paper has beams 4"),
        (["--protocol", "all", "--max_new_tokens", "8"], "max_new_tokens is 8, but protocol paper has max_new_tokens 32"),
        (["--protocol", "papers"], "protocol is 'papers'; expected one of generate, likelihood, both, paper, all"),
        (["--protocol", "paper", "--beams", "0"], "beams is 0; expected a whole number of at least 1"),
    ):
        assert main([*common, *wrong, "--output", str(tmp_path / "wrong")]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1
        assert not (tmp_path / "wrong").exists()
