"""A bar is full once all is done, also where the work went in another count; where an error ended it, it stays where it was."""

import re

import pytest

from doratune.cli.output import progress
from doratune.support.progress import silent


def interrupted(error):
    with progress("work", 10) as advance:
        advance(4)
        raise error


def last_bar(capsys):
    return re.findall(r"work:.*?(\d+)/(\d+|\?)", capsys.readouterr().err.replace("\r", "\n"))[-1]


@pytest.mark.parametrize("counts", [[3, 7], [2], []])
def test_a_bar_is_full_in_the_end(counts, capsys):
    with progress("work", 10) as advance:
        for count in counts:
            advance(count)
    assert last_bar(capsys) == ("10", "10")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_was_interrupted_is_not_full(error, capsys):
    with pytest.raises(error):
        interrupted(error)
    assert last_bar(capsys) == ("4", "10")


def test_of_an_unknown_number_and_of_none(capsys):
    with progress("work", 0), silent("quiet", 10) as quiet:
        quiet(3)
    assert capsys.readouterr().err == ""
    with progress("work", 0) as advance:
        advance(2)
    assert re.search(r"work: 2item", capsys.readouterr().err)
