"""CIDEr of captions (Vedantam 2015) by its reference package, pycocoevalcap: how much a caption says what people's captions say.

The package's own tokenizer is a Java program; here words are those of nltk's Penn Treebank tokenizer, lower case, without the marks
that the package leaves out. On ordinary sentences the two agree; the score of given words is the package's to the last bit. The
weights of words come from all references together: the score of an item depends on the others of its task, and of a single item it
is 0. Cost: counting n-grams.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UserError
from ..support.packages import install_line

LEFT_OUT = {"''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
"""Marks that are no words, as pycocoevalcap has them."""


def caption_scorer():
    """(the package's class, the tokenizer).

    Raises:
        UserError: one of the two packages is not installed.
    """
    try:
        from nltk.tokenize import TreebankWordTokenizer
        from pycocoevalcap.cider.cider import Cider
    except ModuleNotFoundError as error:
        raise UserError(f"captions are scored by {error.name}; run: {install_line('pycocoevalcap')}") from None
    return Cider, TreebankWordTokenizer()


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr of each caption against people's own; the mean is the task's, 1.0 what publications print as 100.

    Raises:
        UserError: the package is not installed.
    """
    cider_class, words = caption_scorer()

    def tokenized(text: str) -> str:
        tokens = words.tokenize(" ".join(text.split()).lower(), convert_parentheses=True)
        return " ".join(token for token in tokens if token not in LEFT_OUT)

    ours = {n: [tokenized(caption)] for n, caption in enumerate(captions)}
    theirs = {n: [tokenized(one) for one in people] for n, people in enumerate(references)}
    return [float(score) for score in cider_class().compute_score(theirs, ours)[1]]
