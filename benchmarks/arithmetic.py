"""The arithmetic test sets without what the training file holds already.

    python benchmarks/arithmetic.py held_out data/math      writes data/math/held_out/TASK.json, says how much of each was left out

LLM-Adapters' arithmetic training file is four fifths of the five test sets' own problems, so a score on a whole test file is
mostly one of memory. Two problems are the same where their words and digits are, whatever case, spaces and punctuation.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

TRAINING = "train.json"


def words(text: str) -> str:
    """What of a problem is compared."""
    return re.sub(r"\W+", " ", text.lower()).strip()


def held_out(folder: Path) -> list[tuple[str, int, int]]:
    """(task, items, items that the training file does not hold), with the latter written to folder/held_out/TASK.json."""
    known = {words(item["instruction"]) for item in json.loads((folder / TRAINING).read_text(encoding="utf-8"))}
    counts, output = [], folder / "held_out"
    output.mkdir(exist_ok=True)
    for path in sorted(folder.glob("*_test.json")):
        items = json.loads(path.read_text(encoding="utf-8"))
        fresh = [item for item in items if words(item["instruction"]) not in known]
        task = path.name.removesuffix("_test.json")
        (output / f"{task}.json").write_text(json.dumps(fresh, ensure_ascii=False, indent=1), encoding="utf-8")
        counts.append((task, len(items), len(fresh)))
    return counts


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "held_out":
        sys.exit(__doc__)
    for task, total, fresh in held_out(Path(sys.argv[2])):
        print(f"{task}: {fresh} of {total} problems are not in {TRAINING}")
