"""Metrics of a written answer against the right one, 0 to 1 each; a new one is one function in METRICS.

    exact_match    the same text, white space aside
    f1             words that both have (SQuAD: lower case, without punctuation and articles; letters of any script)
    rouge_l        longest common subsequence of words, F measure: the package rouge-score, with words of any script
    json           is the output a JSON value? A ```json fence around it is taken off
    json_match     is it the same JSON value as the right answer?
    regex          does the item's pattern, or the one that is set, match somewhere in the output?
    function       what a Python function of the user's own says of (output, item)

Cost: microseconds an answer; rouge_l grows with the product of the lengths.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import regex

from ..errors import UserError, kind_in_words
from ..support.packages import install_line

SEARCH_S = 2.0
"""Seconds that a pattern may search in one output."""
_FENCE = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", re.DOTALL)
_ARTICLES = {"a", "an", "the"}


def exact_match(output: str, gold: str, item: Mapping) -> float:
    return float(output.split() == gold.split())


def words_of(text: str) -> list[str]:
    """Words in lower case, of letters, marks and digits of any script."""
    return regex.findall(r"[\p{L}\p{M}\p{N}]+", text.lower())


def f1(output: str, gold: str, item: Mapping) -> float:
    ours, theirs = ([w for w in words_of(text) if w not in _ARTICLES] for text in (output, gold))
    if not ours or not theirs:
        return float(ours == theirs)
    same = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs))


class _Words:
    """What rouge-score asks for tokens; its own words are those of a to z."""

    def tokenize(self, text: str) -> list[str]:
        return words_of(text)


@cache
def _rouge():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())


def rouge_l(output: str, gold: str, item: Mapping) -> float:
    return float(_rouge().score(gold, output)["rougeL"].fmeasure)


def json_value(text: str):
    """The JSON value of a text, as a tuple of one; () where it is none."""
    fenced = _FENCE.fullmatch(text)
    try:
        return (json.loads(fenced[1] if fenced else text),)
    except (ValueError, RecursionError):
        return ()


def is_json(output: str, gold: str, item: Mapping) -> float:
    return float(bool(json_value(output)))


def json_match(output: str, gold: str, item: Mapping) -> float:
    value = json_value(output)
    return float(bool(value) and value == json_value(gold))


def matches(output: str, gold: str, item: Mapping) -> float:
    try:
        return float(regex.search(item["pattern"], output, timeout=SEARCH_S) is not None)
    except TimeoutError:
        raise UserError(f"pattern {item['pattern'][:80]!r} searches without end; write it without nested repetitions") from None


METRICS: dict[str, Callable[[str, str, Mapping], float]] = {
    "exact_match": exact_match,
    "f1": f1,
    "rouge_l": rouge_l,
    "json": is_json,
    "json_match": json_match,
    "regex": matches,
}
NAMES = (*METRICS, "function")
"""What `metrics` may name."""


def check_metrics(names: tuple[str, ...], function: str | None) -> None:
    """Raise for a metric whose package is missing, or `function` without one."""
    if "rouge_l" in names and importlib.util.find_spec("rouge_score") is None:
        raise UserError(f"metrics holds rouge_l, which needs rouge-score; run: {install_line('rouge_score')}")
    if ("function" in names) != (function is not None):
        raise UserError("metric function runs Python code of yours; give --metrics function and --function FILE.py:NAME together")


def valid_pattern(pattern, where: str) -> str:
    """A pattern that can be searched for.

    Raises:
        UserError: it is no text, or no regular expression.
    """
    if not isinstance(pattern, str):
        raise UserError(f"{where}: the pattern is {kind_in_words(pattern)}; expected text")
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError) as error:
        raise UserError(f"{where}: {pattern[:80]!r} is not a valid regular expression: {error}") from None
    return pattern


def function_at(place: str) -> Callable[[str, str, Mapping], float]:
    """The metric of a user's function at FILE.py:NAME, called with (output, item); its file is run.

    Raises:
        UserError: no such file or function; in a call: it fails, or gives no number from 0 to 1.
    """
    path, _, name = place.rpartition(":")
    if not path or not Path(path).is_file():
        raise UserError(f"function is {place!r}; expected FILE.py:NAME, a file that is there")
    spec = importlib.util.spec_from_file_location("doratune_user_metric", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # any program
        raise UserError(f"function: {path} cannot be run ({type(error).__name__}: {error})") from error
    call = getattr(module, name, None)
    if not callable(call):
        raise UserError(f"function: {path} has no function {name!r}")

    def score(output: str, gold: str, item: Mapping) -> float:
        try:
            value = float(call(output, dict(item)))
        except Exception as error:  # any program
            raise UserError(f"function {place} fails on {output[:60]!r} ({type(error).__name__}: {error})") from error
        if not 0 <= value <= 1:
            raise UserError(f"function {place} gives {value} for {output[:60]!r}; expected a number from 0 to 1, or true or false")
        return value

    return score
