"""Chat data in templates as models have them: which tokens are answer, and what happens to items that a template refuses."""

import copy
import json

import pytest
from conftest import tiny_llama

from doratune.cli.main import main
from doratune.data import encoder, instruction, load_items
from doratune.data.encode import encode_all, encoded
from doratune.errors import UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
R1 = (  # the generation prompt opens a thought that the whole does not show
    "{% for m in messages %}{% if m.role == 'user' %}[U]{{ m.content }}{% else %}[A]{{ m.content.split('</think>')[-1] }}[E]"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}[A]<think>\n{% endif %}"
)
QWEN3 = (  # the last answer keeps its thought, or gets an empty one; earlier ones lose theirs
    "{% set last = messages | length - 1 %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}{% set text = parts[-1].lstrip('\\n') %}"
    "{% set thought = parts[0].split('<think>')[-1].strip('\\n') if parts | length > 1 else '' %}"
    "{% if loop.index0 == last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ text }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
TRIMMING = (
    "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}</s>{% endgeneration %}\n"
    "{% else %}U:{{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
)
CHAT = encoder("chat")
USER, ANSWER = {"role": "user", "content": "hi there"}, {"role": "assistant", "content": "the answer"}


def dialogue(*answers, system=None):
    turns = [{"role": "system", "content": system}] if system else []
    for n, answer in enumerate(answers):
        turns += [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def merging_tokenizer():
    """A byte-level BPE that joins line feeds, also a prompt's last with an answer's first, as large vocabularies do."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"[a-z]+| ?[^\sa-z]+|\s+"), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    inner.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(["a\n\n\nb\n\nc\n\n\n\nd the answer question"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def answers_of(item, tokenizer):
    """(the text of each run of answer tokens, the example); the example has the tokens of the whole rendered text."""
    example = CHAT(item, tokenizer)
    text = tokenizer.apply_chat_template(item["messages"], tokenize=False)
    assert example.ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    runs, before = [], False
    for token, answer in zip(example.ids, example.answer, strict=True):
        if answer:
            runs = [*runs[:-1], [*runs[-1], token]] if before else [*runs, [token]]
        before = answer
    assert tokenizer.decode(example.ids[example.last_answer :]).startswith(tokenizer.decode(runs[-1]))
    return [tokenizer.decode(run) for run in runs], example


@pytest.mark.parametrize(
    ("template", "answers", "learned"),
    [
        (CHATML, ["one"], ["one<|im_end|>\n"]),
        (CHATML, ["one", "two\nlines", "<|im_end|>"], ["one<|im_end|>\n", "two\nlines<|im_end|>\n", "<|im_end|><|im_end|>\n"]),
        (CHATML, ["same", "same"], ["same<|im_end|>\n", "same<|im_end|>\n"]),
        (CHATML, ["zqANSWERqz"], ["zqANSWERqz<|im_end|>\n"]),
        (R1, ["<think>\nwhy\n</think>so"], ["so[E]"]),
        (R1, ["plain", "<think>x</think>more"], ["plain[E]", "more[E]"]),
        (QWEN3, ["plain"], ["plain<|im_end|>\n"]),
        (QWEN3, ["<think>\nwhy\n</think>\n\nso"], ["why\n</think>\n\nso<|im_end|>\n"]),
        (QWEN3, ["<think>\nwhy\n</think>\n\nso", "end"], ["so<|im_end|>\n", "end<|im_end|>\n"]),
        (TRIMMING, ["  one ", "two"], ["one\n", "two\n"]),
        (MARKED, ["one", "two"], ["one</s>", "two</s>"]),
    ],
)
def test_which_tokens_are_answer(template, answers, learned, tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, template)
    for system in (None, "be kind"):
        assert answers_of(dialogue(*answers, system=system), tokenizer)[0] == learned


@pytest.mark.parametrize("begin", ["\n", "\n\n", "\n\n\n\n", "  \n", "\t"])
def test_an_answer_that_begins_with_white_space(begin, merging_tokenizer):
    """The token that holds the prompt's line feed and the answer's is answer."""
    tokenizer = with_template(merging_tokenizer, CHATML)
    item = dialogue(f"{begin}the answer", "x", f"{begin}y")
    runs, example = answers_of(item, tokenizer)
    assert [run.strip() for run in runs] == ["the answer<|im_end|>", "x<|im_end|>", "y<|im_end|>"]
    assert all(run.lstrip("\n").startswith(begin.lstrip("\n")) for run in (runs[0], runs[2]))
    if begin == "\n\n":
        joined = tokenizer("\n\n\n", add_special_tokens=False)["input_ids"]
        assert len(joined) == 1 and joined[0] in [i for i, a in zip(example.ids, example.answer) if a]


def test_offsets_without_their_white_space(merging_tokenizer):
    """A post-processor that trims white space off the offsets (RoBERTa's) changes nothing in what is answer."""
    from tokenizers import processors

    trimming = copy.deepcopy(merging_tokenizer)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    for item in (dialogue("\n\nthe answer", " x "), dialogue("a\n\n", "b")):
        plain, trimmed = (CHAT(item, with_template(t, CHATML)) for t in (merging_tokenizer, trimming))
        assert plain.ids == trimmed.ids and plain.last_answer == trimmed.last_answer
        assert plain.answer == trimmed.answer


class Slow:
    """The tokens of a tokenizer without its offsets, as a tokenizer in plain Python has them."""

    is_fast = False

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __len__(self):
        return len(self.inner)

    def __call__(self, text, **settings):
        assert "return_offsets_mapping" not in settings
        return self.inner(text, **settings)


@pytest.mark.parametrize("template", [CHATML, R1, QWEN3, TRIMMING])
@pytest.mark.parametrize("answers", [["one"], ["\n\none", "two\n"], ["a", "\n\nb", "c"]])
def test_a_tokenizer_without_offsets_finds_the_same(template, answers, merging_tokenizer):
    tokenizer = with_template(merging_tokenizer, template)
    assert CHAT(dialogue(*answers), Slow(tokenizer)) == CHAT(dialogue(*answers), tokenizer)


def test_every_token_that_holds_a_character_of_the_answer(merging_tokenizer):
    text = "ab\n\n\nthe answer é\n\nz"
    whole = merging_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    for begin in range(len(text)):
        for end in range(begin + 1, len(text) + 1):
            expected = [start < end and stop > begin for start, stop in whole["offset_mapping"]]
            assert encoded(merging_tokenizer, text, [(begin, end)]).answer == expected


BAD = {
    "system": [{"role": "system", "content": "be kind"}, USER, ANSWER],
    "two user turns": [USER, USER, ANSWER],
    "assistant first": [ANSWER, USER],
    "empty answer": [USER, {"role": "assistant", "content": ""}],
    "blank answer": [USER, {"role": "assistant", "content": " \n"}],
    "no text": [USER, {"role": "assistant", "content": None}],
    "half a letter": [{"role": "user", "content": "\ud800"}, ANSWER],
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_item_is_one_line_or_skipped_and_counted(kind, tiny_tokenizer, tmp_path):
    tokenizer = with_template(tiny_tokenizer, STRICT)
    good = {"messages": [USER, ANSWER]}
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps(item) for item in (good, good, {"messages": BAD[kind]}, good)))
    with pytest.raises(UserError, match=r"x\.jsonl: item 3") as caught:
        encode_all(load_items(str(path))[0], CHAT, tokenizer, 512)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    unusable = []
    items, _ = load_items(str(path), unusable=unusable)
    rows, report = encode_all(items, CHAT, tokenizer, 512, unusable=unusable)
    assert len(rows) == 3 and report.counts() == {"examples": 3, "cut": 0, "too_long": 0, "unusable": 1}
    assert "3 examples, none too long; 1 unusable items skipped (the first: " in str(report) and "item 3" in str(report)


@pytest.mark.parametrize(
    "item", [{"instruction": "a", "output": ""}, {"instruction": "a"}, {"instruction": 5, "output": "b"}, 7, None, {},
             {"instruction": "a", "output": "b", "input": ["c"]}, {"instruction": "\ud800", "output": "b"}]
)  # fmt: skip
def test_instruction_data_likewise(item, tiny_tokenizer, tmp_path):
    good = {"instruction": "a", "output": "b"}
    path = tmp_path / "x.json"
    path.write_text(json.dumps([good, item, good]))
    with pytest.raises(UserError, match=r"x\.json: item 2"):
        encode_all(load_items(str(path))[0], instruction.encode, tiny_tokenizer, 512)
    unusable = []
    rows, report = encode_all(
        load_items(str(path), unusable=unusable)[0], instruction.encode, tiny_tokenizer, 512, unusable=unusable
    )
    assert len(rows) == 2 and len(report.unusable) == 1


@pytest.mark.parametrize("template", ["{{ messages[9].content }}", "{{ 1 / 0 }}", "{% for %}", "{{ messages[0].x.y }}", "same"])
def test_a_template_that_fails_or_hides_the_answer(template, tiny_tokenizer):
    with pytest.raises(UserError, match="item 1") as caught:
        encode_all([{"messages": [USER, ANSWER]}], CHAT, with_template(tiny_tokenizer, template), 512)
    assert "\n" not in str(caught.value)


def test_nothing_usable_is_said(tiny_tokenizer):
    with pytest.raises(UserError, match="none of 2 items can be used; the first: item 1"):
        encode_all([{"messages": [ANSWER, USER]}] * 2, CHAT, with_template(tiny_tokenizer, STRICT), 512, unusable=[])


def test_a_run_says_and_records_what_it_skipped(tmp_path, tiny_tokenizer, capsys):
    tiny_llama().save_pretrained(tmp_path / "model")
    with_template(tiny_tokenizer, STRICT).save_pretrained(tmp_path / "model")
    turns = [[USER, ANSWER]] * 6 + [BAD["two user turns"], BAD["empty answer"]]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"messages": turn}) for turn in turns))
    words = ["train", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "x.jsonl"), "--output", str(tmp_path / "run")]
    words += ["--rank", "2", "--max_steps", "1", "--dtype", "float32", "--tensorboard", "false", "--batch_size", "2"]
    assert main(words) == 2
    assert "x.jsonl: item 8 has an empty answer (message 2)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*words, "--bad_items", "skip"]) == 0
    assert "6 examples, none too long; 2 unusable items skipped" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["data"]["training"] == {"examples": 6, "cut": 0, "too_long": 0, "unusable": 2}
    assert metrics["examples"] == 6
