"""Judgments on disk, a JSON object a line, written when they come: what was paid for is never asked again.

One answer's judgment has FastChat's layout; of two answers each order is a line, with model_a, model_b and the place that won. A
judgment counts for a case that reads the same to the same judge: prompt name and text are compared, not question numbers. Half a
line of a killed process, at the end of the file, is taken out. Cost: the file is read once.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from ..errors import UserError
from ..support.durable import one_line_errors
from ..support.text import lines, read_text
from .cases import Case
from .verdicts import UNPARSABLE, rating, winner


def whole_lines(path: Path) -> list[dict]:
    """The objects of a file that is written line by line; half a line at its end is cut off there.

    Raises:
        UserError: another line that is no JSON object.
    """
    if not path.is_file():
        return []
    text = read_text(path, errors="replace")
    rows = []
    written = lines(text)
    for number, line in enumerate(written, 1):
        if not line.strip():
            continue
        if _whole(line):
            rows.append(json.loads(line))
        elif number == len(written):
            with open(path, "rb+") as file:
                file.truncate(path.read_bytes().rstrip(b"\n").rfind(b"\n") + 1)
        else:
            raise UserError(f"{path}, line {number} is no JSON object; mend it, or delete the file")
    if text and not text.endswith("\n") and rows and _whole(written[-1]):
        append(path, "")
    return rows


def _whole(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def append(path: Path, line: str) -> None:
    """Write one line at a file's end, at once."""
    with one_line_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()


class Ledger:
    """The judgments of one judge in one file.

    Raises:
        UserError: a line that is no judgment, or another judge's.
    """

    def __init__(self, path: Path, judge: str):
        self.path, self.judge = path, judge
        self.judgments: dict[tuple[str, str], list[str]] = {}
        for number, row in enumerate(whole_lines(path), 1):
            try:
                (model, name), text, said = row["judge"], row["user_prompt"], row["judgment"]
            except (KeyError, TypeError, ValueError):
                raise UserError(f"{path}, line {number} is no judgment; move the file away") from None
            if model != judge:
                raise UserError(f"{path} holds judgments of {model}, not of {judge}; give another output")
            self.judgments.setdefault((name, text), []).append(said)

    def of(self, case: Case) -> str | None:
        """The judgment of a case, the first that can be read; None where it was never asked."""
        said = self.judgments.get(case.key)
        return next((text for text in said if verdict(case, text) is not None), said[0]) if said else None

    def asked(self, case: Case) -> int:
        """How often it was asked."""
        return len(self.judgments.get(case.key, ()))

    def add(self, case: Case, text: str) -> None:
        """Keep a judgment, in memory and on disk."""
        self.judgments.setdefault(case.key, []).append(text)
        read = verdict(case, text)
        row = {"question_id": case.question.number}
        row |= {"model": case.models[0]} if len(case.models) == 1 else {"model_a": case.models[0], "model_b": case.models[1]}
        row |= {"judge": [self.judge, case.prompt.name], "user_prompt": case.text, "judgment": text}
        row |= {"score": UNPARSABLE if read is None else read} if len(case.models) == 1 else {"winner": read or "error"}
        append(self.path, json.dumps(row | {"turn": case.turn, "tstamp": time.time()}, ensure_ascii=False))


def verdict(case: Case, text: str) -> float | str | None:
    """The rating, or the place of the winner; None where there is none to be read."""
    return rating(text) if len(case.models) == 1 else winner(text)
