"""README.md of results: what it says, and whose cards stay."""

import json

import pytest
import yaml
from conftest import randomize, tiny_llama

import doratune
from doratune.publishing.card import CARD, OURS, add_scores, write_merged_card, write_training_card

SETTINGS = {
    "model": "owner/base",
    "data": "owner/set",
    "output": "/srv/run",
    "method": "dora",
    "rank": 8,
    "lr": 1e-3,
    "batch_size": 4,
}
METRICS = {
    "trainable": 12345,
    "examples": 30,
    "steps": 7,
    "final_loss": 0.25,
    "eval_loss": None,
    "seconds": 61.4,
    "environment": {"versions": {"torch": "2.13", "transformers": "5", "peft": None, "doratune": "0.1"}},
}


@pytest.fixture
def adapter(tmp_path):
    def saved(**config):
        model = tiny_llama()
        model.config._name_or_path = "owner/base"
        doratune.attach(model, doratune.AdapterConfig(**{"rank": 4, "targets": ["q_proj"]} | config))
        randomize(model)
        folder = tmp_path / "run" / "adapter"
        doratune.save(model, folder)
        return folder

    return saved


def head_and_text(folder):
    _, head, text = (folder / CARD).read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_a_training_card_says_base_data_settings_figures_versions_and_how_to_load(adapter):
    folder = adapter()
    write_training_card(folder, SETTINGS, {"rank": 16, "lr": 3e-4, "batch_size": 4, "method": "dora"}, METRICS)
    head, text = head_and_text(folder)
    assert head["base_model"] == "owner/base" and head["datasets"] == ["owner/set"] and head["library_name"] == "peft"
    for words in (
        "# run",
        "| rank | `8` |",
        "| trained numbers | 12,345 |",
        "| steps | 7 |",
        "torch 2.13",
        "doratune.load(model",
        "PeftModel",
    ):
        assert words in text
    assert "/srv" not in text and "eval" not in text and "peft None" not in text


@pytest.mark.parametrize(
    ("config", "library"), [({}, "peft"), ({"magnitude_axis": "input"}, "doratune"), ({"method": "dvora"}, "doratune")]
)
def test_peft_is_named_only_where_it_opens_the_folder(adapter, config, library):
    folder = adapter(**config)
    write_training_card(folder, SETTINGS, {}, METRICS)
    head, text = head_and_text(folder)
    assert head["library_name"] == library and ("PeftModel" in text) == (library == "peft")


@pytest.mark.parametrize("place", ["/srv/models/base", "./base", "~/base"])
def test_a_card_tells_nobody_how_a_disk_looks(adapter, place):
    folder = adapter()
    write_training_card(folder, SETTINGS | {"model": place, "data": [place + ".jsonl", "owner/set"]}, {}, METRICS)
    head, text = head_and_text(folder)
    assert "base_model" not in head and place not in text and head["datasets"] == ["owner/set"]


def test_a_card_of_somebody_else_stays(adapter):
    folder = adapter()
    (folder / CARD).write_text("# mine\n")
    write_training_card(folder, SETTINGS, {}, METRICS)
    assert (folder / CARD).read_text() == "# mine\n"
    (folder / CARD).write_text(f"{OURS}\nold")
    write_training_card(folder, SETTINGS, {}, METRICS)
    assert "| rank | `8` |" in (folder / CARD).read_text()


def test_the_card_is_no_part_of_the_adapter(adapter):
    folder = adapter()
    write_training_card(folder, SETTINGS, {}, METRICS)
    doratune.load(tiny_llama(), folder)


def test_scores_of_evaluations_are_put_in_and_replaced(adapter, tmp_path):
    folder, results = adapter(), tmp_path / "evaluated"
    write_training_card(folder, SETTINGS, {}, METRICS)
    results.mkdir()
    for accuracy in (0.5, 0.75):
        figure = {"task": "boolq", "protocol": "generate", "total": 20, "accuracy": accuracy, "standard_error": 0.1}
        (results / "results.json").write_text(json.dumps({"results": [figure]}))
        add_scores(folder, [results])
    text = (folder / CARD).read_text()
    assert "| boolq | generate | 20 | 75.0 % | 10.0 |" in text and "50.0 %" not in text


def test_wrong_scores_are_refused_and_the_card_stays(adapter, tmp_path):
    folder = adapter()
    with pytest.raises(doratune.UserError, match=r"no README\.md"):
        add_scores(folder, [tmp_path])
    write_training_card(folder, SETTINGS, {}, METRICS)
    before = (folder / CARD).read_text()
    with pytest.raises(doratune.UserError, match=r"holds no results\.json"):
        add_scores(folder, [tmp_path])
    (tmp_path / "results.json").write_text('{"results": 3}')
    with pytest.raises(doratune.UserError, match=r"no results\.json of doratune evaluate"):
        add_scores(folder, [tmp_path])
    assert (folder / CARD).read_text() == before


def test_a_merged_card_has_the_bases_licence_and_the_adapters_training(adapter, tmp_path):
    folder, base, merged = adapter(), tmp_path / "base", tmp_path / "merged"
    write_training_card(folder, SETTINGS, {}, METRICS)
    base.mkdir(), merged.mkdir()
    (base / CARD).write_text("---\nlicense: apache-2.0\n---\n# The base, which scores 99 %\n")
    (merged / "config.json").write_text("{}")
    write_merged_card(merged, "owner/base", folder, "dora", base)
    head, text = head_and_text(merged)
    assert head["license"] == "apache-2.0" and head["base_model_relation"] == "finetune" and head["library_name"] == "transformers"
    assert "| rank | `8` |" in text and "99 %" not in text and "AutoModelForCausalLM" in text


@pytest.mark.parametrize("text", ["---\n: : [\n---\n", "no head", "---\nlicense: [a, b]\n---\n", ""])
def test_a_damaged_card_of_the_base_costs_only_its_licence(tmp_path, text):
    (tmp_path / "base").mkdir(), (tmp_path / "merged").mkdir()
    (tmp_path / "base" / CARD).write_text(text)
    write_merged_card(tmp_path / "merged", "owner/base", tmp_path / "nowhere", "dora", tmp_path / "base")
    assert "license" not in head_and_text(tmp_path / "merged")[0]
