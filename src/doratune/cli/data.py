"""`doratune data FILE --model M`: what the model will see of a data set, and what is wrong with it, before anything is trained."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..data.settings import DataSettings
from ..errors import UserError
from ..support.fields import setting_names, with_settings_of
from ..support.values import number
from .arguments import parse
from .inputs import refuse_missing
from .output import print_json, say, say_next

EXAMPLE = "doratune data my.jsonl --model my-model --max_length 1024 --test test.jsonl --fix clean.jsonl"
LISTED = 10
"""Lines of a kind that are shown; --json has them all."""


@dataclass(kw_only=True)
@with_settings_of(DataSettings, after="model")
class DataCheck:
    """Show what a model sees of a data set (the text with its special tokens, what is learned), how long its items are, what will
    be cut or skipped, and which items are wrong, odd, double, or in the test set. Exit status 1: items that cannot be used.

    Args:
        data: files, folders or hub ids, as doratune train takes them
        model: hub id, local folder, or smollm2-135m-instruct: whose tokenizer and chat template
        max_length: longest example in tokens
        too_long: cut (on the prompt's left) or skip
        test: a test set: which items ask what it asks
        fix: write the items that can be used, that are not double and not in the test set to this .jsonl file
        show: so many items as the model sees them
        mirror: base address of a mirror of the published data sets
        trust_remote_code: run the Python code that the model's folder or repository brings
        overwrite: replace the file of fix
    """

    data: list[str] = field(default_factory=list)
    model: str | None = None
    max_length: int = number(512, least=1)
    too_long: Literal["cut", "skip"] = "cut"
    test: str | None = None
    fix: str | None = None
    show: int = number(3, least=0)
    mirror: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False


def main(argv: list[str]) -> int:
    settings, as_json = parse(DataCheck, argv, "data", EXAMPLE, words="data")
    _check(settings)
    from ..data import load_items, recognition
    from ..data.image_reader import load_reader
    from ..data.survey import survey

    reading = DataSettings(**{name: getattr(settings, name) for name in setting_names(DataSettings)})
    tokenizer = load_reader(settings.model, settings.trust_remote_code)
    unusable: list[str] = []
    items, kind = load_items(settings.data, settings.mirror, unusable=unusable, settings=reading)
    say(recognition(kind, settings.data_format))
    limits = settings.max_length, settings.too_long, settings.show
    found = survey(items, kind, tokenizer, reading, *limits, _test_questions(settings, reading), unusable)
    for line in (*_shown(found, tokenizer), *_lengths(found, settings), *_listed(found, settings.data)):
        say(line)
    if settings.fix:
        _write(Path(settings.fix), [item.raw for item in found.clean])
        then = f": doratune train --data {settings.fix} --model {settings.model}" if kind.learns else ""
        say(f"{len(found.clean)} clean items written to {settings.fix}{then}")
    elif kind.learns and len(found.clean) < len(items) + len(unusable):
        say_next(("data", *settings.data, "--model", settings.model, "--fix", "clean.jsonl"))
    elif kind.learns:
        say_next(("init", *settings.data, "--model", settings.model))
    if as_json:
        lists = {name: getattr(found, name) for name in ("unusable", "odd", "double", "leaked")}
        print_json({"data_format": kind.name, "counts": found.counts(), "tokens": _percentiles(found), **lists})
    return 1 if found.unusable and not settings.fix else 0


def _check(settings: DataCheck) -> None:
    from ..support.outputs import refuse_inputs

    if not settings.data:
        raise UserError("data is not set; give a file: doratune data FILE --model M")
    if not settings.model:
        raise UserError("model is not set; give --model M, whose tokenizer and chat template decide what is seen")
    refuse_missing({"data": settings.data, "test": settings.test})
    if settings.fix:
        refuse_inputs(settings.fix, {"the data": settings.data, "the test set": settings.test})
        if not settings.fix.endswith(".jsonl"):
            raise UserError(f"fix is {settings.fix!r}; give a name that ends in .jsonl")
        if Path(settings.fix).exists() and not settings.overwrite:
            raise UserError(f"fix: {settings.fix} exists; give another name, or --overwrite")


def _test_questions(settings: DataCheck, reading: DataSettings):
    """The questions of the test set; None where there is none."""
    if settings.test is None:
        return None
    from ..data import load_items
    from ..data.leakage import TestQuestions

    reading = dataclasses.replace(reading, data_format="auto", columns={})
    items, kind = load_items(settings.test, settings.mirror, unusable=[], settings=reading)
    return TestQuestions((item.where.rpartition(": ")[2], kind.question(item, reading)) for item in items)


def _shown(found, tokenizer):
    """The first items as the model sees them."""
    from ..data.visible import BEGIN, END, visible

    if found.shown:
        yield f"as the model sees them, learned between {BEGIN} and {END}:"
    for item, parts in found.shown:
        for name, example in parts:
            label = ", ".join(filter(None, (item.where, name)))
            yield f"--- {label}: {len(example.ids)} tokens, {sum(example.answer)} learned"
            yield visible(example, tokenizer)


def _percentiles(found) -> dict[str, dict[str, int]]:
    from ..data.survey import PERCENTILES, percentile

    table = {}
    for name in ("tokens", "learned") if found.sizes else ():
        values = [getattr(size, name) for size in found.sizes]
        table[name] = {"least": min(values)} | {f"{p} %": percentile(values, p) for p in PERCENTILES}
        table[name] |= {"most": max(values), "all": sum(values)}
    return table


def _lengths(found, settings: DataCheck):
    """Lengths, and what the limit does to them."""
    table = _percentiles(found)
    if not table:
        return
    header = list(table["tokens"])
    widths = [max(len(name), *(len(str(row[name])) for row in table.values())) for name in header]
    yield "--- lengths"
    yield "  ".join(["of an example   ", *(name.rjust(w) for name, w in zip(header, widths))])
    for label, row in zip(("all its tokens  ", "learned of them "), table.values()):
        yield "  ".join([label, *(str(row[name]).rjust(w) for name, w in zip(header, widths))])
    fits = found.fits
    text = f"max_length {settings.max_length}: {fits['whole']} stay whole, {fits['cut']} are cut on the prompt's left, "
    text += f"{fits['divided']} are divided, " * bool(fits["divided"]) + f"{fits['skipped']} are skipped"
    yield text + (f"; --max_length {table['tokens']['most']} keeps all" if fits["whole"] < len(found.sizes) else "")


def _listed(found, sources: list[str]):
    """The items that there is something to say of."""
    titles = {
        "unusable": "cannot be used (bad_items: skip leaves them out)",
        "double": "are there more than once",
        "leaked": "are in the test set too",
        "odd": "are odd",
    }
    for name, title in titles.items():
        lines = getattr(found, name)
        if lines:
            yield f"--- {len(lines)} items {title}"
            yield from (line.removeprefix(f"{sources[0]}: ") if len(sources) == 1 else line for line in lines[:LISTED])
            yield from [f"… and {len(lines) - LISTED} more; --json has them all"] * (len(lines) > LISTED)
    n = found.counts()
    yield f"{n['clean']} items are clean; {n['unusable']} unusable, {n['double']} double, {n['leaked']} in the test"


def _write(path: Path, items: list[dict]) -> None:
    from ..support.files import replacing

    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(item, ensure_ascii=False, default=str) + "\n" for item in items)
