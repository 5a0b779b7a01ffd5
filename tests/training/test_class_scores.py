"""Accuracy, balanced accuracy and AUROC against values worked out by hand."""

import numpy as np
import pytest

from doratune.training.class_scores import class_scores, softmax


def test_two_classes_worked_out_by_hand():
    """Four images of class 0, two of class 1. Answers 0 0 0 1 | 1 0: 4 of 6 right; recalls 3/4 and 1/2; of the 8 pairs the
    positive has the higher probability in 1·4 (0.9) + 2 (0.3 above 0.1 and 0.2), and one tie (0.3) counts a half."""
    of_one = np.array([0.1, 0.2, 0.3, 0.6, 0.9, 0.3])
    scores = class_scores(np.array([0, 0, 0, 0, 1, 1]), np.stack([1 - of_one, of_one], 1))
    assert scores == pytest.approx({"accuracy": 4 / 6, "balanced_accuracy": 5 / 8, "auroc": 6.5 / 8})


def test_three_classes_worked_out_by_hand():
    """Gold 0 0 1 2; answers 0 1 1 0. Recalls 1/2, 1, 0. One against the rest: class 0 has 0.6, 0.1 against 0.2, 0.5: 2 of 4 pairs;
    class 1 has 0.7 against 0.3, 0.5, 0.3: 3 of 3; class 2 has 0.2 against 0.1, 0.4, 0.1: 2 of 3."""
    rows = np.array([[0.6, 0.3, 0.1], [0.1, 0.5, 0.4], [0.2, 0.7, 0.1], [0.5, 0.3, 0.2]])
    scores = class_scores(np.array([0, 0, 1, 2]), rows)
    assert scores == pytest.approx({"accuracy": 0.5, "balanced_accuracy": 0.5, "auroc": (2 / 4 + 1 + 2 / 3) / 3})


def test_classes_that_do_not_occur_count_for_nothing():
    """Also where one of them is an answer: no warning, no recall of nothing."""
    rows = np.array([[0.6, 0.3, 0.1, 0.0], [0.1, 0.5, 0.4, 0.0], [0.2, 0.1, 0.7, 0.0]])
    scores = class_scores(np.array([0, 1, 1]), rows)
    assert scores == pytest.approx({"accuracy": 2 / 3, "balanced_accuracy": 3 / 4, "auroc": 1.0})
    assert class_scores(np.array([1, 1]), rows[1:]) == pytest.approx({"accuracy": 0.5, "balanced_accuracy": 0.5})


def test_softmax_of_large_logits():
    assert softmax(np.array([[1000.0, 1000.0], [0.0, np.log(3)]])) == pytest.approx(np.array([[0.5, 0.5], [0.25, 0.75]]))
