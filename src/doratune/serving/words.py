"""Text as its tokens come: only what later tokens cannot change, and nothing that is, or may become, a stop.

A character may need several tokens, and a token's text may depend on the one before; so a short window of tokens is decoded twice,
without and with the new ones, and the difference is new text once it ends in a whole character. Cost: two decodings of a few
tokens for each token. Joined, the pieces are the tokenizer's own text of all tokens (but for bytes that are no text: some
tokenizers write a broken character for each byte of a run with a broken one in it). A stop counts once it is complete.
"""

from __future__ import annotations

from collections.abc import Sequence

BROKEN = "\ufffd"
"""What a tokenizer writes for bytes that are no whole character."""


class Words:
    """The text of one answer.

    Args:
        stops: texts that end the answer; none of them, and nothing behind, is part of it.
    """

    def __init__(self, tokenizer, stops: Sequence[str] = ()):
        self.tokenizer, self.stops = tokenizer, list(stops)
        self.ids: list[int] = []
        self.start = self.read = 0
        self.held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain with this token; `stopped` says whether a stop was written."""
        self.ids.append(token)
        return self._certain(self._new())

    def close(self) -> str:
        """What was held back, once no token comes any more."""
        text = self._certain(self._new(whole=False))
        rest, self.held = ("" if self.stopped else self.held), ""
        return text + rest

    def _text(self, begin: int, end: int | None = None) -> str:
        ids = self.ids[begin:end]
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) if ids else ""

    def _new(self, whole: bool = True) -> str:
        before, now = self._text(self.start, self.read), self._text(self.start)
        if len(now) <= len(before) or (whole and now.endswith(BROKEN)):
            return ""
        self.start, self.read = self.read, len(self.ids)
        return now[len(before) :]

    def _certain(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self.held + piece
        if places := [place for stop in self.stops if (place := text.find(stop)) >= 0]:
            self.held, self.stopped = "", True
            return text[: min(places)]
        hold = max((_overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - hold :]
        return text[: len(text) - hold]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
