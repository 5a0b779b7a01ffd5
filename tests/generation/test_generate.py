"""doratune generate: prompts in every form, batched as alone, several adapters, JSON lines whole or absent, bad input."""

import json

import pytest
import torch
from conftest import randomize
from transformers import AutoModelForCausalLM, AutoTokenizer

import doratune
from doratune import UserError
from doratune.cli.main import main
from doratune.data.instruction import prompt_of
from doratune.generation.adapters import NamedAdapters, named
from doratune.generation.prompts import read_prompts, rendered
from doratune.generation.sampling import Sampling, answers


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_folder):
    """{name: folder} of two adapters of the tiny model."""
    result = {}
    for seed, name in enumerate(("one", "two")):
        model = AutoModelForCausalLM.from_pretrained(tiny_folder)
        model.name_or_path = model.config._name_or_path = str(tiny_folder)
        doratune.attach(model, doratune.AdapterConfig(rank=4, targets=["q_proj", "v_proj", "down_proj"]))
        folder = tmp_path_factory.mktemp("runs") / name / "adapter"
        doratune.save(randomize(model, seed=seed, scale=1.0), folder)
        result[name] = folder
    return result


def greedy(folder, adapter, text, new=12):
    """The reference: transformers alone, one prompt, no padding; the new token ids as text."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if adapter is not None:
        doratune.load(model, adapter)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    for _ in range(new):
        with torch.no_grad():
            token = model(ids).logits[0, -1].argmax()
        ids = torch.cat([ids, token[None, None]], 1)
        if token == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, len(tokenizer(text, add_special_tokens=False)["input_ids"]) :], skip_special_tokens=True)


TEXTS = ["the correct answer", "true", "a much longer prompt about option1 and ending4 of the answer", "false?"]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_say_what_single_prompts_say(batch_size, tmp_path, tiny_folder, folders):
    file, out = tmp_path / "p.txt", tmp_path / "out.jsonl"
    file.write_text("\n".join(TEXTS) + "\n\n")
    words = ["--prompts", str(file), "--adapter", str(folders["one"]), "--template", "plain", "--max_new_tokens", "12"]
    assert main(["generate", *words, "--batch_size", str(batch_size), "--output", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == TEXTS and {row["adapter"] for row in rows} == {"one"}
    assert [row["output"] for row in rows] == [greedy(tiny_folder, folders["one"], text) for text in TEXTS]
    assert all(row["finish"] == ("length" if row["tokens"] == 12 else "stop") for row in rows)


def test_several_adapters_and_the_base(tmp_path, tiny_folder, folders, capsys):
    words = ["--adapter", str(folders["one"]), "--adapter", f"zwei={folders['two']}", "--compare", "--template", "plain", "--json"]
    assert main(["generate", "--prompt", "Say: yes, {no} or true", *words, "--max_new_tokens", "8"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["adapter"] for row in rows] == ["base", "one", "zwei"] == json.loads(last)["adapters"]
    for row, adapter in zip(rows, (None, folders["one"], folders["two"]), strict=True):
        assert row["output"] == greedy(tiny_folder, adapter, "Say: yes, {no} or true", 8)
    assert len({row["output"] for row in rows}) == 3


def test_what_the_model_reads(tiny_tokenizer):
    def text(item, *arguments):
        return tiny_tokenizer.decode(rendered(item, tiny_tokenizer, *arguments))

    chat = [{"role": "user", "content": "true"}, {"role": "assistant", "content": "false"}, {"role": "user", "content": "the"}]
    assert text({"prompt": "true"}) == "[user]true</s>[assistant]"
    assert text({"prompt": "true"}, "plain") == "true"
    assert text({"prompt": "true"}, "auto", "the answer") == "[system]the answer</s>[user]true</s>[assistant]"
    assert text({"messages": chat}) == "[user]true</s>[assistant]false</s>[user]the</s>[assistant]"
    item = {"instruction": "true", "input": "option1"}
    assert text(item) == prompt_of(item) and text(item, "chat") == "[user]true\n\noption1</s>[assistant]"
    assert text({"prompt": "true"}, "instruction") == prompt_of({"instruction": "true"})
    with pytest.raises(UserError, match="system needs a chat template"):
        text({"prompt": "true"}, "plain", "x")
    with pytest.raises(UserError, match="messages need --template chat"):
        text({"messages": chat}, "plain")


def test_templates_that_are_missing_or_refuse(tiny_tokenizer):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="refuses a conversation of user: roles must alternate"):
        rendered({"prompt": "x"}, tokenizer)
    tokenizer.chat_template = None
    assert rendered({"prompt": "true"}, tokenizer) == tokenizer("true")["input_ids"]
    with pytest.raises(UserError, match="has no chat template"):
        rendered({"prompt": "x"}, tokenizer, "chat")


def test_lines_of_a_text_file_are_what_the_file_says(tmp_path):
    """A byte-order mark, Windows line ends, a separator of Unicode inside a prompt, empty lines."""
    (tmp_path / "p.txt").write_bytes("\ufeffone\r\n\r\ntwo\u2028still two\nthree  \n".encode())
    assert [item["prompt"] for item in read_prompts(tmp_path / "p.txt")] == ["one", "two\u2028still two", "three  "]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", "\n \n", "holds no prompts"),
        ("p.txt", None, "no such file"),
        ("p.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("p.jsonl", '{"prompt": "x"}\n{"text": "y"}\n', "item 2 has none of"),
        ("p.jsonl", '{"prompt": ""}\n', "item 1 has no text"),
        ("p.jsonl", '{"messages": [{"role": "user"}]}\n', "item 1 has no list"),
        ("p.jsonl", '{"messages": []}\n', "item 1 has no list"),
        ("p.json", "[1]", "item 1 is a whole number"),
    ],
)
def test_bad_files(name, content, words, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=words):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--prompt", "x", "--temperature", "-1"], "temperature is -1"),
        (["--prompt", "x", "--temperature", "nan"], "temperature is 'nan'"),
        (["--prompt", "x", "--top_p", "0"], "top_p is 0"),
        (["--prompt", "x", "--max_new_tokens", "0"], "max_new_tokens is 0"),
        (["--prompt", "x", "--seed", "-1"], "seed is -1"),
        (["--prompt", "x", "--batch_size", "0"], "batch_size is 0"),
        (["--prompt", "x", "--max_new_tokens", "300"], "more than the model's 256"),
        (["--prompt", "x", "--prompts", "y"], "one of --prompts"),
        ([], "one of --prompts"),
        (["--prompt", "x", "--adapter", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_bad_settings(words, reason, tiny_folder, tmp_path, capsys):
    assert main(["generate", "--model", str(tiny_folder), "--output", str(tmp_path / "out.jsonl"), *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("doratune generate: ") and reason in error
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_exists_stays(tmp_path, tiny_folder, capsys):
    (tmp_path / "out.jsonl").write_text("mine")
    words = ["generate", "--model", str(tiny_folder), "--prompt", "true", "--max_new_tokens", "2"]
    assert main([*words, "--output", str(tmp_path / "out.jsonl")]) == 2
    assert (tmp_path / "out.jsonl").read_text() == "mine"
    assert main([*words, "--output", str(tmp_path / "out.jsonl"), "--overwrite"]) == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["prompt"] == "true"


def test_sampling_is_repeatable_and_follows_the_distribution(tiny_folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)
    prompts = [tokenizer("true")["input_ids"]] * 2000

    def first_tokens(**settings):
        found = answers(model, tokenizer, prompts, Sampling(max_new_tokens=1, **settings), batch_size=500)
        return [answer.text for answer in found]

    one, again, other = (first_tokens(temperature=1.0, seed=seed) for seed in (0, 0, 1))
    assert one == again != other
    narrow = first_tokens(temperature=1.0, top_p=0.02)
    with torch.no_grad():
        share = model(torch.tensor([prompts[0]])).logits[0, -1].softmax(-1).sort(descending=True).values
    assert len(set(narrow)) <= int((share.cumsum(0) < 0.02).sum()) + 1 < len(set(one))
    assert set(first_tokens(temperature=1e-3)) == set(first_tokens())


def test_every_token_that_ends_a_text_ends_it(tiny_folder):
    """A checkpoint's second end (of a turn) counts, its sampling settings do not."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)
    ids = [tokenizer("true")["input_ids"]]
    free = answers(model, tokenizer, ids, Sampling(max_new_tokens=6))[0]
    with torch.no_grad():
        first = model(torch.tensor(ids)).logits[0, -1].argmax().item()
    model.generation_config.eos_token_id = [2, first]
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0
    ended = answers(model, tokenizer, ids, Sampling(max_new_tokens=6))[0]
    assert free.tokens == 6 and (ended.tokens, ended.finish) == (1, "stop")


def test_names_of_adapters(tmp_path):
    runs = [tmp_path / "a" / "adapter", tmp_path / "b" / "adapter", tmp_path / "c"]
    for run in runs:
        run.mkdir(parents=True)
    assert named([str(run) for run in runs]) == {"a": str(runs[0]), "b": str(runs[1]), "c": str(runs[2])}
    assert named([f"x={runs[0]}", str(runs[2])]) == {"x": str(runs[0]), "c": str(runs[2])}
    for entries, words in (
        ([runs[0], runs[0]], "twice"),
        ([f"c={runs[0]}", runs[2]], "two adapters are named 'c'"),
        ([f"base={runs[0]}"], "name base"),
    ):
        with pytest.raises(UserError, match=words):
            named([str(entry) for entry in entries])


def test_using_one_after_the_other(tiny_folder, folders):
    adapters = NamedAdapters(None, [str(folder) for folder in folders.values()])
    ids = torch.arange(3, 30)[None]

    def logits(name):
        with torch.no_grad():
            return adapters.use(name)(ids).logits

    first = {name: logits(name) for name in ("base", "one", "two")}
    assert all(torch.equal(logits(name), first[name]) for name in ("two", "one", "base", "one"))
    with torch.no_grad():
        assert torch.equal(first["base"], AutoModelForCausalLM.from_pretrained(tiny_folder)(ids).logits)
    with pytest.raises(UserError, match="did you mean 'one'"):
        adapters.use("onne")
    assert adapters.current == "one"
    assert sorted(doratune.names(adapters.model)) == ["one", "two"]  # both are loaded


def test_switching_reads_no_file_again(tmp_path, tiny_folder, folders):
    import shutil

    copies = {name: tmp_path / name for name in ("a b", "a_b", "ö")}  # names that an adapter in a model cannot have, or two alike
    for folder, source in zip(copies.values(), [*folders.values(), folders["one"]], strict=True):
        shutil.copytree(source, folder)
    adapters = NamedAdapters(str(tiny_folder), [f"{name}={folder}" for name, folder in copies.items()])
    ids = torch.arange(3, 30)[None]
    first = {name: adapters.use(name)(ids).logits for name in adapters.names}
    for folder in copies.values():
        shutil.rmtree(folder)
    assert all(torch.equal(adapters.use(name)(ids).logits, first[name]) for name in ("a_b", "base", "ö", "a b"))
    assert torch.equal(first["a b"], first["ö"]) and not torch.equal(first["a b"], first["a_b"])
    with doratune.mixed(adapters.load_all(), [adapters.inside[name] for name in copies]):
        assert torch.allclose(adapters.model(ids.expand(3, -1)).logits[1], first["a_b"][0], atol=1e-5)


def test_an_adapter_that_does_not_fit_leaves_the_others(tmp_path, tiny_folder, folders):
    from conftest import tiny_llama

    other = tiny_llama(layers=3)
    doratune.attach(other, doratune.AdapterConfig(rank=4, targets=["q_proj"]))
    doratune.save(other, tmp_path / "deep")
    adapters = NamedAdapters(str(tiny_folder), [str(folders["one"]), str(tmp_path / "deep")])
    ids = torch.arange(3, 30)[None]
    before = adapters.use("one")(ids).logits
    with pytest.raises(UserError, match="does not fit"):
        adapters.use("deep")
    assert adapters.current == "one" and torch.equal(adapters.model(ids).logits, before)
    with pytest.raises(UserError, match="does not fit"):
        adapters.load_all()
