"""One evaluation: a model's answers, the judge's calls, the figures, all in a folder that the same command goes on in.

OUTPUT/mt_bench.json                         whose answers, and how they were written
OUTPUT/model_answer/MODEL.jsonl              the answers, in the published layout
OUTPUT/model_judgment/JUDGE_single.jsonl     one judgment a line; JUDGE_pair.jsonl for two runs
OUTPUT/results.json                          the figures
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError, listed
from ..support.files import read_json, write_json
from ..support.progress import Progress, silent
from .answers import AnswerSettings, model_of, read_answers, write_answers
from .cases import Case, pair_cases, single_cases, without_reference
from .client import Judge, JudgeSettings
from .figures import pair_figures, pair_table, single_figures, single_table
from .ledger import Ledger, verdict
from .questions import Bench

RECORD = "mt_bench.json"
OWN = (RECORD, "results.json", "model_answer", "model_judgment")
ATTEMPTS = 2
"""How often a case is asked until its judgment can be read."""


@dataclass
class BenchRun:
    """MT-Bench of one model in one folder.

    Args:
        identity: what the answers depend on; another identity's folder is refused.
        model_id: its name in the files.
    """

    bench: Bench
    output: Path
    model_id: str
    identity: dict
    say: Callable[[str], None] = print

    @property
    def answer_file(self) -> Path:
        return self.output / "model_answer" / f"{self.model_id}.jsonl"

    def begin(self, overwrite: bool = False) -> None:
        """Take the folder, or go on in it.

        Raises:
            UserError: it holds something else.
        """
        record = self.output / RECORD
        if self.output.exists() and not self.output.is_dir():
            raise UserError(f"{self.output} is a file; give another output")
        if record.is_file() and overwrite:
            for name in OWN:
                path = self.output / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if record.is_file():
            before = read_json(record, "give another output")
            wanted = self.identity | {"model_id": self.model_id}
            differing = [f"{k} {before.get(k)!r} there, {v!r} here" for k, v in wanted.items() if before.get(k) != v]
            if differing:
                raise UserError(
                    f"{self.output} holds answers of another run ({listed(differing, 2)}); give another output, or --overwrite"
                )
        elif self.output.is_dir() and any(self.output.iterdir()):
            raise UserError(f"{self.output} exists and holds no MT-Bench run; give another output")
        else:
            write_json(record, self.identity | {"model_id": self.model_id})

    def missing(self) -> list[int]:
        """Questions without an answer."""
        there = read_answers(self.answer_file, self.model_id)
        return [q.number for q in self.bench.questions if len(there.get(q.number, ())) < len(q.turns)]

    def answer(self, model, tokenizer, settings: AnswerSettings, done: Callable[[int], None]) -> None:
        """Write what is missing of the answers."""
        write_answers(model, tokenizer, self.bench, self.answer_file, self.model_id, settings, done)

    def take(self, answers: Path) -> None:
        """Take the answers of a file over as the run's own.

        Raises:
            UserError: a question that is not answered there.
        """
        rows = read_answers(answers, self.model_id)
        unknown = sorted(set(rows) - {q.number for q in self.bench.questions})
        single_cases(self.bench, self.model_id, rows)
        if unknown:
            self.say(f"note: {answers} answers {len(unknown)} questions that are not asked here ({listed(map(str, unknown), 3)})")
        self.answer_file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(answers, self.answer_file)

    def judge(self, settings: JudgeSettings, progress: Progress = silent) -> dict:
        """Ratings of the answers, one by one.

        Raises:
            UserError: a call that failed; the judgments so far are kept, and the same command goes on.
        """
        cases = single_cases(self.bench, self.model_id, read_answers(self.answer_file, self.model_id))
        ledger = self._judged(cases, settings, "single", progress)
        figures = single_figures(cases, ledger)
        self.say(single_table(figures))
        return self._result(figures, settings)

    def judge_against(self, other: Path, settings: JudgeSettings, progress: Progress = silent) -> dict:
        """The answers beside another run's, in both orders."""
        path = answers_of(other)
        rival = model_of(path)
        if rival == self.model_id:
            raise UserError(f"{path} holds answers of {rival}, as this run does; compare two models, or rename one (model_id)")
        mine, theirs = read_answers(self.answer_file, self.model_id), read_answers(path)
        cases = pair_cases(self.bench, (self.model_id, mine), (rival, theirs))
        ledger = self._judged(cases, settings, "pair", progress)
        figures = pair_figures(cases, ledger)
        self.say(pair_table(figures))
        return self._result(figures, settings)

    def _judged(self, cases: Sequence[Case], settings: JudgeSettings, way: str, progress) -> Ledger:
        judge = Judge(settings)
        path = self.output / "model_judgment" / f"{file_name(settings.model)}_{way}.jsonl"
        ledger = Ledger(path, settings.model)
        open_cases = list({case.key: case for case in cases if ledger.of(case) is None}.values())
        there = sum(ledger.of(case) is not None for case in cases)
        calls = f"{len(open_cases)} calls of the judge {settings.model} at {settings.url}"
        self.say(f"{calls} ({there} of {len(cases)} judgments are there); what cannot be read is asked {ATTEMPTS} times")
        if numbers := without_reference(self.bench):
            self.say(f"note: judged without a reference, for there is none: question {listed(map(str, numbers), 10)}")
        try:
            with progress(f"judge, {way}", len(open_cases)) as advance:

                def take(case: Case, text: str) -> None:
                    ledger.add(case, text)
                    advance(1)

                judge.ask_all(open_cases, take)
                for _ in range(1, ATTEMPTS):
                    again = [c for c in cases if verdict(c, ledger.of(c)) is None and ledger.asked(c) < ATTEMPTS]
                    judge.ask_all({case.key: case for case in again}.values(), take)
        except UserError as error:
            there = f"{sum(ledger.of(case) is not None for case in cases)} of {len(cases)} judgments are in {path}"
            raise UserError(f"{error}; {there}: the same command goes on from there") from None
        return ledger

    def _result(self, figures: dict, settings: JudgeSettings) -> dict:
        return figures | {"judge": settings.model, "judge_url": settings.url}


def answers_of(place: Path) -> Path:
    """The answer file of another run: the file, or the one in its folder.

    Raises:
        UserError: there is none, or several.
    """
    if place.is_file():
        return place
    files = sorted((place / "model_answer").glob("*.jsonl"))
    if len(files) != 1:
        raise UserError(f"{place}: expected a run of MT-Bench with one model's answers, or a file of answers; it has {len(files)}")
    return files[0]


def file_name(name: str) -> str:
    """A model's name as part of a file's name."""
    return re.sub(r"[^\w.+-]+", "_", name).strip("._") or "model"
