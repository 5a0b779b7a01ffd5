"""VQA's soft accuracy: an answer counts as far as people gave it, min(1, people / 3), after a normalization of both.

Of ten answers each is left out once and the answer held against the other nine; the score is the mean over the ten. The
normalization is that of the official evaluation, in its order:

    punctuation     taken out where the mark stands beside a space, or a comma parts digits; else a space in its place
    full stop       taken out unless a digit follows
    numbers         none, zero, one … ten become digits
    articles        a, an, the are left out
    contractions    dont → don't; the table has no shes, lets, im, ive, so those stay as they are

TextVQA's evaluation takes commas and question marks out first and parts 's from its word. Where all people agree, VQA's
official program compares letter for letter; here the normalized answer counts there too, which is what LLaVA's scripts hand
in. Sources: VQA (Antol 2015, Goyal 2017), TextVQA (Singh 2019): their published evaluations, written anew. Cost: a few
regular expressions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

PUNCTUATION = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!")
ARTICLES = ("a", "an", "the")
NUMBERS = {"none": 0} | {
    word: n for n, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
}
ENOUGH = 3
"""People who gave an answer that counts in full."""

_WORDS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd
how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at
shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_COMMA = re.compile(r"\d,\d")
_STOP = re.compile(r"\.(?!\d)")


def _contractions() -> dict[str, str]:
    """A word without one of its apostrophes → the word; "somebody'd" loses its own, as the official table has it."""
    table = {"somebody'd": "somebodyd"}
    for word in _WORDS.split():
        table |= {word[:i] + word[i + 1 :]: word for i, letter in enumerate(word) if letter == "'"}
    return table


CONTRACTIONS = _contractions()


def cleaned(text: str) -> str:
    """A text on one line, without space around it."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalized(text: str) -> str:
    """A text as the official evaluation of VQA compares it."""
    text = cleaned(text)
    parted = _COMMA.search(text) is not None
    plain = text
    for mark in PUNCTUATION:
        plain = plain.replace(mark, "" if parted or f"{mark} " in text or f" {mark}" in text else " ")
    words = [str(NUMBERS.get(word, word)) for word in _STOP.sub("", plain).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def text_normalized(text: str) -> str:
    """A text as the official evaluation of TextVQA compares it."""
    return normalized(cleaned(text.lower().replace(",", "").replace("?", "").replace("'s", " 's")))


def soft_score(answer: str, answers: Sequence[str], text_rule: bool = False) -> float:
    """How far people gave this answer, 0 to 1.

    Args:
        answers: of the people, ten as published.
        text_rule: normalize as TextVQA does.
    """
    rule = text_normalized if text_rule else normalized
    people = [cleaned(one) for one in answers]
    if text_rule or len(set(people)) > 1:
        ours, people = {rule(answer)}, [rule(one) for one in people]
    else:
        ours = {cleaned(answer), rule(answer)}
    matches = [one in ours for one in people]
    others = sum(matches)
    return sum(min(1.0, (others - match) / ENOUGH) for match in matches) / len(people)


def most_frequent(answers: Sequence[str]) -> str:
    """The answer that most people gave, normalized; the first of equals."""
    return Counter(normalized(one) for one in answers).most_common(1)[0][0]
