"""Each message that the troubleshooting page quotes is one of the package's."""

import re

import messages
import pytest
from pages import ROOT, text_of

QUOTES = re.findall(r"^### `(.*)`$", text_of(ROOT / "docs" / "troubleshooting.md"), re.M)


@pytest.mark.parametrize("quote", QUOTES)
def test_the_message_exists(quote):
    assert messages.exists(quote)


def test_there_are_many_and_none_twice():
    assert len(QUOTES) > 40 and len(set(QUOTES)) == len(QUOTES)


@pytest.mark.parametrize(
    "invented", ["the model is too lovely", "has the rolle …; expected one of …", "expected a whole number of at most 1"]
)
def test_an_invented_message_does_not(invented):
    assert not messages.exists(invented)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ('f"{a} is {b!r}; give one"', "… is …; give one"),
        ('"one " + f"two {x}" + name', "one two ……"),
        ('("one "\n "two")', "one two"),
        ("3 + 4", ""),
    ],
)
def test_a_message_is_read_off_the_source(source, message):
    import ast

    assert messages.shown(ast.parse(source, mode="eval").body) == message
