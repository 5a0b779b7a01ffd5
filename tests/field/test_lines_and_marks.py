"""Text files as other programs write them: lines that end in a line feed alone, a byte-order mark in front, Windows line ends."""

import json
from pathlib import Path

import pytest

from doratune.comparison.collect import read_verdicts
from doratune.data import load_items
from doratune.data.files import read_examples
from doratune.errors import UserError
from doratune.evaluation.tasks import load_task
from doratune.support.files import read_json
from doratune.support.text import lines
from doratune.support.yaml_text import read_yaml

SEPARATORS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"]
BOM = b"\xef\xbb\xbf"


def items(separator: str) -> list[dict]:
    texts = (f"first{separator}second", "third")
    return [{"instruction": f"Is it {text}?", "output": f"it is{separator}{text}", "answer": "true"} for text in texts]


def jsonl(rows, end="\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_jsonl_with_separators_inside_its_strings(separator, end, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(jsonl(items(separator), end))
    assert read_examples(tmp_path / "x.jsonl") == items(separator)
    assert load_items(str(tmp_path / "x.jsonl"))[0] == items(separator)
    assert load_task(str(tmp_path / "x.jsonl"))[1] == items(separator)


@pytest.mark.parametrize("separator", SEPARATORS)
def test_the_item_file_of_a_comparison(separator, tmp_path):
    rows = [{"prompt": f"a{separator}b", "output": separator, "gold": "true", "correct": n % 2 == 0} for n in range(3)]
    (tmp_path / "demo.generate.jsonl").write_bytes(jsonl(rows))
    verdicts, _ = read_verdicts(tmp_path / "demo.generate.jsonl", 3)
    assert verdicts.tolist() == [1, 0, 1]


def test_a_broken_line_is_named_by_its_number(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(jsonl(items("\u2028")) + b"{oops\n")
    with pytest.raises(UserError, match="line 3: malformed JSON"):
        read_examples(tmp_path / "x.jsonl")


@pytest.mark.parametrize("content", [b"[" * 100_000, b'[{"a": ' + b"9" * 5000 + b"}]", b'{"a": ' + b"[" * 100_000])
@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_json_that_python_cannot_hold_is_one_line(content, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="JSON") as caught:
        read_examples(tmp_path / name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_lines():
    assert lines("a\r\nb\n\nc\rd\u2028e") == ["a", "b", "", "c\rd\u2028e"]
    assert lines("") == [] and lines("\n") == [""]


def test_a_byte_order_mark_everywhere_text_is_read(tmp_path):
    for name, content in (("x.json", json.dumps(items(" ")).encode()), ("x.jsonl", jsonl(items(" ")))):
        (tmp_path / name).write_bytes(BOM + content)
        assert read_examples(tmp_path / name) == items(" ")
    (tmp_path / "x.yaml").write_bytes(BOM + b"rank: 4\n")
    assert read_yaml(tmp_path / "x.yaml") == {"rank": 4}
    (tmp_path / "config.json").write_bytes(BOM + b'{"a": 1}')
    assert read_json(tmp_path / "config.json", "") == {"a": 1}


def test_a_recipe_with_a_mark(tmp_path):
    from doratune.cli.arguments import parse
    from doratune.training.recipe import TrainRecipe

    path = Path(tmp_path / "r.yaml")
    path.write_bytes(BOM + b"rank: 4\r\nlr: 1e-3\r\n")
    recipe, _ = parse(TrainRecipe, [str(path)], "train", "", recipe=True)
    assert (recipe.rank, recipe.lr) == (4, 1e-3)
