"""Figures of answers and captions, worked out by hand; and a model on the published files."""

import json

import pytest

from doratune.data.visual_tasks import Sight, VisualItem
from doratune.evaluation.captions import cider
from doratune.evaluation.seen import figures_of


def item(task, *answers, chance=0.0):
    return VisualItem(task, "1", (Sight("a.png", task.startswith("tv")),), "Q?", answers, "item 1", chance=chance)


def test_soft_answers():
    """min(1, people / 3), each person left out once: 10 of 10, 3 of 10, 1 of 10, none."""
    people = ["cat"] * 10, ["cat"] * 3 + ["dog"] * 7, ["cat"] + ["dog"] * 9, ["dog"] * 10
    figures, records = figures_of([item("vqa", *answers) for answers in people], ["Cat.", "a cat", "cat", "cat"])
    of_three = (7 * 1 + 3 * 2 / 3) / 10
    of_one = (9 * 1 / 3 + 0) / 10
    assert [record["score"] for record in records] == pytest.approx([1, of_three, of_one, 0])
    assert figures["accuracy"] == pytest.approx((1 + of_three + of_one) / 4) and figures["right"] == 1
    assert figures["majority"] == pytest.approx((0 + 1 + 1 + 1) / 4) and records[1]["gold"] == "dog"  # always dog
    few, _ = figures_of([item("vqa", "two", "2"), item("vqa", "red")], ["2", "the red"])
    assert few["accuracy"] == 1.0  # of one's own, with fewer answers than soft accuracy needs


def test_exact_answers():
    items = [item("nlvr", label, chance=0.5) for label in ("true", "false", "false")] + [item("tvqa", "a3", chance=0.2)]
    figures, records = figures_of(items, ["True", "true", "", "a3."])
    assert [record["correct"] for record in records] == [True, False, False, True]
    assert (figures["accuracy"], figures["unparsable"]) == (0.5, 0.25)
    assert figures["chance"] == pytest.approx((3 * 0.5 + 0.2) / 4) and figures["majority"] == pytest.approx(3 / 4)
    assert "image" in records[0] and "image" not in records[3] and "cider" not in figures


def test_captions_and_answers_together():
    pytest.importorskip("pycocoevalcap")
    people = [("a red circle", "one circle"), ("the blue square",), ("a green thing",)]
    items = [item("caption", *people[0]), item("gqa", "yes"), item("tvc", *people[1]), item("yc2c", *people[2])]
    figures, records = figures_of(items, ["a red circle", "yes", "the blue square here", "dog"])
    scores = cider(["a red circle", "the blue square here", "dog"], people)
    assert [record["score"] for record in records] == pytest.approx([scores[0], 1, *scores[1:]])
    assert figures["cider"] == pytest.approx(sum(scores) / 3) and figures["accuracy"] == pytest.approx((sum(scores) + 1) / 4)
    assert [record["correct"] for record in records] == [True, True, False, False]
    json.dumps([figures, records])
