"""Answer files, held against the questions they answer.

Every question has one answer, and every answer a question: anything else is the answer file of other questions, or of a run
that did not finish, and its score would be a number about nothing. Cost: the file is held whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...data.documents import entries
from ...errors import UserError, listed


def answer_texts(path: Path, ids: Sequence[str], id_keys: Sequence[str], text_keys: Sequence[str]) -> list[str]:
    """The answer to each of these questions, in their order.

    Raises:
        UserError: malformed; questions without an answer, answers to other questions, or two to one.
    """
    texts: dict[str, str] = {}
    for number, entry in enumerate(entries(path), 1):
        name = next((key for key in id_keys if key in entry), None)
        text = next((key for key in text_keys if key in entry), None)
        if name is None or text is None or not isinstance(entry[text], str | int | float):
            lacking = " or ".join(map(repr, id_keys if name is None else text_keys))
            raise UserError(f"{path}: answer {number} has no {lacking}; its keys are {listed(map(repr, entry), 6)}")
        if str(entry[name]) in texts:
            raise UserError(f"{path}: answer {number} is the second to question {entry[name]}; leave one")
        texts[str(entry[name])] = str(entry[text])
    missing, strange = [one for one in ids if one not in texts], sorted(texts.keys() - set(ids))
    if missing or strange:
        parts = [f"{len(missing)} of {len(ids)} questions have no answer (the first: {missing[0]})"] if missing else []
        parts += [f"{len(strange)} answers are to other questions (the first: {strange[0]})"] if strange else []
        raise UserError(f"{path} does not belong to these questions: {', '.join(parts)}; give the answers to this very file")
    return [texts[one] for one in ids]
