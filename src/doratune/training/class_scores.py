"""Figures of a classifier from labels and probabilities: accuracy, balanced accuracy, AUROC, by scikit-learn.

    balanced accuracy   the mean of the classes' shares of right answers (recall), over the classes that occur
    AUROC               how often an image of a class has a higher probability of it than one of another class: of two classes that
                        of the second one, else the mean over the classes that occur, each against the rest (macro, one versus rest)

Cost: sorting the probabilities, a class at a time.
"""

from __future__ import annotations

import numpy as np
from sklearn.metrics import recall_score, roc_auc_score


def class_scores(gold_N: np.ndarray, probabilities_NC: np.ndarray) -> dict[str, float]:
    """accuracy, balanced_accuracy and auroc; without auroc where all images are of one class.

    Args:
        gold_N: classes, from 0 on. probabilities_NC: a row an image; logits do for all but AUROC of more than two classes.
    """
    gold, probabilities = np.asarray(gold_N), np.asarray(probabilities_NC, dtype=np.float64)
    answers, there = probabilities.argmax(1), np.unique(gold)
    scores = {
        "accuracy": float((answers == gold).mean()),
        "balanced_accuracy": float(recall_score(gold, answers, labels=there, average="macro", zero_division=0.0)),
    }
    if len(there) > 1:
        classes = [1] if probabilities.shape[1] == 2 else there
        scores["auroc"] = float(np.mean([roc_auc_score(gold == one, probabilities[:, one]) for one in classes]))
    return scores


def softmax(logits_NC: np.ndarray) -> np.ndarray:
    """Probabilities of logits."""
    shifted = np.asarray(logits_NC, dtype=np.float64)
    shifted = np.exp(shifted - shifted.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)
