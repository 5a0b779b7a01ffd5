"""What a message says of a value that has no place in a file: in the words of JSON and YAML, behind the right article."""

import json
import re

import pytest

import doratune
from doratune.cli.main import main
from doratune.errors import kind_in_words, with_article

KINDS = [
    (5, "a whole number"),
    (0.5, "a number"),
    ("text", "a text"),
    ([1], "a list"),
    (None, "null"),
    (True, "true"),
    ({"a": 1}, "an object"),
]
PYTHON = re.compile(r"\b(int|float|str|bool|dict|NoneType|tuple)\b|\ba [aeio]")


@pytest.mark.parametrize(("value", "words"), KINDS, ids=lambda value: str(value))
def test_a_value_of_a_file(value, words):
    assert kind_in_words(value) == words


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Embedding", "an Embedding"),
        ("'olmo2'", "an 'olmo2'"),
        ("ai-toolkit", "an ai-toolkit"),
        ("assistant", "an assistant"),
        ("LSTM", "an LSTM"),
        ("RMSNorm", "an RMSNorm"),
        ("Linear", "a Linear"),
        ("UNet2DConditionModel", "a UNet2DConditionModel"),
        ("GPT2Model", "a GPT2Model"),
        ("user", "a user"),
        ("", "a "),
    ],
)
def test_the_article_of_a_name(name, shown):
    assert with_article(name) == shown


@pytest.mark.parametrize("value", [value for value, _ in KINDS[:-1]], ids=str)
def test_in_the_files_of_an_adapter_and_of_prompts(value, tmp_path, tiny_folder, capsys):
    """Each of these files holds an object, or items that are objects."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(value))
    (tmp_path / "items.json").write_text(json.dumps([value]))
    (tmp_path / "nested.jsonl").write_text(json.dumps({"instruction": "a", "output": "b", "input": value or 3}))
    model = ["--model", str(tiny_folder)]
    runs = [
        ["inspect", "--adapter", str(tmp_path / "adapter"), *model],
        ["convert", "--adapter", str(tmp_path / "adapter"), "--to", "mlx", "--output", str(tmp_path / "out")],
        ["data", str(tmp_path / "items.json"), *model],
        ["evaluate", "--task", str(tmp_path / "items.json"), *model],
    ]
    runs += [] if isinstance(value, str) else [["data", str(tmp_path / "nested.jsonl"), *model]]
    for words in runs:
        assert main(words) in (1, 2), words
        said = capsys.readouterr()
        line = (said.err or said.out).strip()
        assert line and not PYTHON.search(line.replace(str(tmp_path), "")), line
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]})
    )
    (tmp_path / "own" / "doratune.json").write_text(json.dumps({"adapter": value}))
    assert main(["inspect", "--adapter", str(tmp_path / "own"), *model]) == 2
    line = capsys.readouterr().err
    assert f"doratune.json has {kind_in_words(value)} under 'adapter'" in line and not PYTHON.search(
        line.replace(str(tmp_path), "")
    )
    with pytest.raises(doratune.UserError, match=r"adapter_config\.json") as error:
        doratune.load(doratune.support.models.load_model(str(tiny_folder)), tmp_path / "adapter")
    assert kind_in_words(value) in str(error.value) and not PYTHON.search(str(error.value).replace(str(tmp_path), ""))
