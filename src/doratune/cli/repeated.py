"""A list setting whose flag is given more than once: `--adapter a --adapter b` is `--adapter a b`."""

from __future__ import annotations


def gathered(argv: list[str], name: str) -> list[str]:
    """The arguments with all values of this flag behind one flag, at the end."""
    flag, rest, values, words = f"--{name}", [], [], list(argv)
    while words:
        word = words.pop(0)
        if word.startswith(flag + "="):
            values.append(word.partition("=")[2])
        elif word == flag:
            while words and not words[0].startswith("--"):
                values.append(words.pop(0))
        else:
            rest.append(word)
    return [*rest, flag, *values] if values else rest
