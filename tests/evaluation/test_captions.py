"""CIDEr as its reference package has it, on words that need no Java."""

import pytest

pytest.importorskip("pycocoevalcap")

from pycocoevalcap.cider.cider import Cider

from doratune.evaluation.captions import cider

PEOPLE = [
    ["a red circle on a white ground", "one circle, red"],
    ["a blue square", "the square is blue", "a square that is blue"],
    ["a green triangle in the corner", "a triangle"],
]


def test_it_is_the_packages_value():
    """Words of a to z, which every tokenizer cuts alike."""
    plain = [[one.replace(",", "") for one in people] for people in PEOPLE]
    captions = ["a red circle", "the square is blue", "a dog runs on the beach"]
    mean, each = Cider().compute_score(dict(enumerate(plain)), {n: [one] for n, one in enumerate(captions)})
    ours = cider(captions, PEOPLE)
    assert ours == pytest.approx(list(each), abs=1e-12) and sum(ours) / 3 == pytest.approx(float(mean), abs=1e-12)
    assert ours[0] > 1 > ours[2] and ours[1] > 3


def test_marks_and_case_are_no_words():
    """As of the package's tokenizer, whose marks are left out; clitics are words of their own."""
    plain = cider(["a dog 's red ball is n't here", "a b c", "d e f"], [["a dog 's red ball"], ["a b"], ["d e"]])
    marked = cider(["A dog's red ball isn't here.", "a b, c!", "(d e) f"], [["A dog's red ball."], ["a - b"], ["d; e"]])
    assert marked == pytest.approx(plain, abs=1e-12)


def test_an_empty_caption_is_worth_nothing():
    assert cider(["", "a blue square", "a triangle"], PEOPLE)[0] == 0
    assert cider([" \n ", "a blue square", "a triangle"], PEOPLE)[0] == 0
