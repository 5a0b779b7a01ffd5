"""MT-Bench end to end over HTTP: answers of a tiny model, a scripted judge, figures; what is paid for is never asked again."""

import json
import re
import time

import pytest
from server import completion, serving

from doratune.cli.main import main

PLACES = {
    "single-v1": "[Question]\n{question}\n[Answer]\n{answer}",
    "single-v1-multi-turn": "{question_1}|{answer_1}|{question_2}|{answer_2}",
    "single-math-v1": "[Question]\n{question}\n[Reference]\n{ref_answer_1}\n[Answer]\n{answer}",
    "single-math-v1-multi-turn": "{question_1}|{ref_answer_1}|{question_2}|{ref_answer_2}|{answer_1}|{answer_2}",
    "pair-v2": "{question}\nA:{answer_a}\nB:{answer_b}",
    "pair-v2-multi-turn": "{question_1}|{question_2}\nA:{answer_a_1}|{answer_a_2}\nB:{answer_b_1}|{answer_b_2}",
    "pair-math-v1": "{question} ref {ref_answer_1}\nA:{answer_a}\nB:{answer_b}",
    "pair-math-v1-multi-turn": (
        "{question_1}|{question_2} ref {ref_answer_1}|{ref_answer_2}\nA:{answer_a_1}|{answer_a_2}\nB:{answer_b_1}|{answer_b_2}"
    ),
}


def line(number, model, turns):
    return {"question_id": number, "answer_id": "x", "model_id": model, "choices": [{"index": 0, "turns": turns}], "tstamp": 1.0}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def bench(tmp_path):
    """Four questions of three categories; those of math and coding have references."""
    folder = tmp_path / "bench"
    folder.mkdir()
    questions = [(1, "writing"), (2, "math"), (3, "coding"), (4, "writing")]
    write(
        folder / "question.jsonl", [{"question_id": n, "category": c, "turns": [f"q{n}?", f"more of {n}?"]} for n, c in questions]
    )
    write(folder / "reference_answer_gpt-4.jsonl", [line(n, "gpt-4", [f"r{n}", f"s{n}"]) for n in (2, 3)])
    prompts = [{"name": k, "type": "x", "system_prompt": f"system of {k}", "prompt_template": v} for k, v in PLACES.items()]
    write(folder / "judge_prompts.jsonl", prompts)
    return folder


def answers(tmp_path, model="mine", text="answer {n} {t} {{braces}}", numbers=(1, 2, 3, 4)):
    rows = [line(n, model, [text.format(n=n, t=t) for t in (1, 2)]) for n in numbers]
    return write(tmp_path / f"{model}.jsonl", rows)


@pytest.fixture
def judged(tmp_path, bench, capsys):
    """Runs the command on answers that are there; (status, results, lines of output, error)."""

    def run(url, *more, file=None, output="out", model="j"):
        words = ["evaluate", "--task", "mt_bench", "--questions", str(bench), "--output", str(tmp_path / output), "--json"]
        words += ["--answers", str(file or answers(tmp_path))] + (["--judge", url, "--judge_model", model] if url else [])
        status = main([*words, "--judge_parallel", "1", *more])
        out, err = capsys.readouterr()
        said = "\n".join(row for row in err.strip().splitlines() if "item/s]" not in row)  # without the progress bar
        return status, json.loads(out.strip().splitlines()[-1]) if status == 0 else None, out, said

    return run


def test_ratings_by_category_and_turn(judged, tmp_path, monkeypatch):
    """The right prompt for each question and turn, the published decoding, the key; the number of calls comes first."""
    monkeypatch.setenv("DORATUNE_JUDGE_KEY", "secret-key")
    scores = {("q1?", 1): "[[7]]", ("q1?", 2): "so [[5.5]]", ("q2?", 1): "Rating: [3]", ("q4?", 1): "[[11]] or [[9]]"}

    def script(body, number):
        text = body["messages"][1]["content"]
        turn = 2 if "more of" in text else 1
        return completion(next((said for (q, t), said in scores.items() if q in text and t == turn), "no rating"))

    with serving(script) as (url, requests):
        status, results, out, _ = judged(url)
    assert status == 0 and "8 calls of the judge j at http://127.0.0.1" in out and "(0 of 8 judgments are there)" in out
    figures = results["single"]["categories"]
    assert figures["writing"] | {"interval": 0} == {
        "turn_1": 7.0, "turn_2": 5.5, "mean": 6.25, "interval": 0, "judgments": 4, "unparsable": 0.5,
    }  # fmt: skip
    assert figures["math"]["turn_1"] == 3.0 and figures["math"]["turn_2"] is None
    assert figures["coding"]["mean"] is None and figures["coding"]["unparsable"] == 1.0
    assert figures["all"]["mean"] == pytest.approx((7 + 5.5 + 3) / 3) and figures["all"]["unparsable"] == 5 / 8
    low, high = figures["all"]["interval"]
    assert low < figures["all"]["mean"] < high
    first = {r["messages"][0]["content"]: r["messages"][1]["content"] for r in requests}
    assert first["system of single-math-v1"].startswith("[Question]\nq") and "\n[Reference]\nr" in first["system of single-math-v1"]
    assert "|answer " in first["system of single-v1-multi-turn"] and "{braces}" in first["system of single-v1"]
    asked = {(r["temperature"], r["max_tokens"], r["model"], r["path"]) for r in requests}
    assert asked == {(0, 2048, "j", "/v1/chat/completions")}
    assert {r["key"] for r in requests} == {"Bearer secret-key"}
    assert "secret-key" not in out and not any("secret-key" in p.read_text() for p in (tmp_path / "out").rglob("*.json*"))
    rows = [json.loads(row) for row in (tmp_path / "out/model_judgment/j_single.jsonl").read_text().splitlines()]
    assert len(rows) == len(requests) == 8 + 5, "each of the five that could not be read is asked once more"
    assert {"question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"} == set(rows[0])
    assert {row["score"] for row in rows} == {7.0, 5.5, 3.0, -1}


def test_nothing_is_asked_twice(judged):
    with serving(lambda body, number: completion("[[4]]")) as (url, requests):
        assert judged(url)[0] == 0 and len(requests) == 8
        status, results, out, _ = judged(url)
        assert status == 0 and len(requests) == 8 and "0 calls" in out and "(8 of 8 judgments are there)" in out
        assert judged(url, model="another")[0] == 0 and len(requests) == 16
    assert results["single"]["categories"]["all"]["interval"] == [4.0, 4.0]


def test_a_second_try_that_can_be_read_counts(judged):
    with serving(lambda body, number: completion("[[6]]" if number > 8 else "hm")) as (url, requests):
        _, results, _, _ = judged(url)
        assert len(requests) == 16 and results["single"]["categories"]["all"]["unparsable"] == 0
        assert judged(url)[1] == results and len(requests) == 16


@pytest.mark.parametrize(
    "trouble",
    [
        (429, {"Retry-After": "0"}, {"error": {"message": "slow down"}}),
        (500, {}, {"error": {"message": "oops"}}),
        (503, {"Retry-After": "0"}, "busy"),
        (408, {}, {}),
    ],
)
def test_passing_trouble_is_tried_again(trouble, judged):
    with serving(lambda body, number: trouble if number in (2, 3) else completion("[[8]]")) as (url, requests):
        status, results, _, _ = judged(url)
    assert status == 0 and len(requests) == 10
    assert results["single"]["categories"]["all"]["mean"] == 8.0


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ((429, {"Retry-After": "0"}, {"error": {"message": "quota"}}), "limits the rate still after 1 tries (quota)"),
        ((401, {}, {"error": {"message": "bad key"}}), "answers 401 (bad key)"),
        ((404, {}, {"error": {"message": "no model j"}}), "answers 404 (no model j)"),
        ((500, {}, {"error": {"message": "broken"}}), "answers 500 (broken)"),
        ((200, {"Content-Type": "text/html"}, "<html>hello</html>"), "answers what is no chat completion"),
        ((200, {}, "not json"), "answers what is no chat completion"),
        ((200, {}, {"object": "list", "data": []}), "answers what is no chat completion"),
        ((200, {}, {"choices": []}), "answers what is no chat completion"),
    ],
)
def test_lasting_trouble_keeps_what_is_there(trouble, said, judged, tmp_path):
    """One line, status 2, the judgments so far on disk; the same command goes on with the rest."""
    with serving(lambda body, number: trouble if number > 3 else completion("[[5]]")) as (url, _):
        status, _, _, error = judged(url, "--judge_retries", "1")
        assert status == 2 and said in error and len(error.splitlines()) == 1
        assert "3 of 8 judgments are in" in error and "the same command goes on from there" in error
    assert not (tmp_path / "out" / "results.json").exists()
    with serving(lambda body, number: completion("[[5]]")) as (url, requests):
        status, results, out, _ = judged(url)
    assert status == 0 and len(requests) == 5 and "(3 of 8 judgments are there)" in out
    assert results["single"]["categories"]["all"]["judgments"] == 8


def test_a_judge_that_says_nothing_is_unparsable(judged):
    with serving(lambda body, number: completion(None)) as (url, requests):
        status, results, _, _ = judged(url)
    assert status == 0 and results["single"]["categories"]["all"] == {
        "turn_1": None, "turn_2": None, "mean": None, "interval": None, "judgments": 8, "unparsable": 1.0,
    }  # fmt: skip


def test_the_rate_limits_wait_is_kept(judged):
    """Retry-After is waited for, by each of the calls that run side by side."""
    times = []

    def script(body, number):
        times.append(time.monotonic())
        return (429, {"Retry-After": "1"}, {"error": {"message": "slow"}}) if number <= 2 else completion("[[3]]")

    with serving(script) as (url, requests):
        assert judged(url, "--judge_parallel", "2")[0] == 0
    assert len(requests) == 10 and sorted(times)[-1] - times[0] >= 1


def test_calls_side_by_side_stop_together(judged):
    """After a failure no further call begins; what was under way is kept."""

    def script(body, number):
        if number > 3:
            time.sleep(2)  # the one that failed is heard of meanwhile
        return completion("[[3]]") if number != 3 else (401, {}, {"error": {"message": "no"}})

    with serving(script) as (url, requests):
        status, _, _, error = judged(url, "--judge_parallel", "2")
        assert status == 2 and "answers 401" in error and 3 <= len(requests) <= 4
        known = int(re.search(r"(\d) of 8 judgments", error)[1])
        assert known == len(requests) - 1


def test_answers_that_are_the_same_are_asked_once(judged, tmp_path):
    """Of two equal answers both orders read the same: one call, and a tie whatever the judge says."""
    twin = answers(tmp_path, "twin")
    with serving(lambda body, number: completion("[[A]]")) as (url, requests):
        _, results, out, _ = judged(url, "--against", str(twin))
    assert len(requests) == 8 and "8 calls" in out
    assert (results["pair"]["tied"], results["pair"]["win_rate"]) == (8, 0.5)


def test_nobody_at_the_address(judged, tmp_path):
    status, _, _, error = judged("http://127.0.0.1:9/v1", "--judge_retries", "0")
    assert status == 2 and "the judge at http://127.0.0.1:9/v1 cannot be reached" in error and "0 of 8 judgments" in error
    assert len(error.splitlines()) == 1 and (tmp_path / "out/model_answer/mine.jsonl").is_file()


def test_half_a_line_of_a_killed_process_is_asked_again(judged, tmp_path):
    with serving(lambda body, number: completion("[[5]]")) as (url, requests):
        judged(url)
        path = tmp_path / "out/model_judgment/j_single.jsonl"
        whole = path.read_bytes()
        for cut, calls in ((len(whole) - 1, 0), (len(whole) - 30, 1), (whole.index(b"\n") + 10, 7)):
            path.write_bytes(whole[:cut])
            before = len(requests)
            assert judged(url)[0] == 0 and len(requests) - before == calls
            assert len([json.loads(row) for row in path.read_text().splitlines()]) == 8
        path.write_bytes(b"{]\n" + whole)
        status, _, _, error = judged(url)
        assert status == 2 and "line 1 is no JSON object" in error


def test_pairs_in_both_orders(judged, tmp_path):
    """Who is liked for the first place alone ties; who is better in both orders wins."""
    other = answers(tmp_path, "rival", "worse {n} {t}")

    def script(body, number):
        text = body["messages"][1]["content"]
        if "q1?" in text:
            return completion("[[A]]")  # whoever comes first
        if "q2?" in text:
            return completion("[[A]]" if text.index("answer ") < text.index("worse ") else "[[B]]")
        return completion("[[C]]" if "q3?" in text else "neither")

    with serving(script) as (url, requests):
        status, results, out, _ = judged(url, "--against", str(other))
        assert status == 0 and "16 calls of the judge" in out and len(requests) == 16 + 4
        again = judged(url, "--against", str(other))[1]
        assert again == results and len(requests) == 20
    pair = results["pair"]
    assert (pair["model"], pair["against"], pair["won"], pair["lost"], pair["tied"]) == ("mine", "rival", 2, 0, 4)
    assert pair["win_rate"] == pytest.approx((2 + 4 * 0.5) / 6) and pair["unparsable"] == 0.25
    assert pair["orders_disagree"] == 0.25
    texts = [r["messages"][1]["content"] for r in requests if "q3?" in r["messages"][1]["content"]]
    assert sum("A:answer" in t for t in texts) == sum("B:answer" in t for t in texts) == 2
    assert all(" ref r3" in t for t in texts)


def test_a_question_without_its_reference_is_judged_without_and_named(judged, bench):
    lines = (bench / "reference_answer_gpt-4.jsonl").read_text().splitlines(True)
    (bench / "reference_answer_gpt-4.jsonl").write_text(lines[0])
    with serving(lambda body, number: completion("[[5]]")) as (url, requests):
        status, _, out, _ = judged(url)
    assert status == 0 and "judged without a reference, for there is none: question 3" in out
    systems = [r["messages"][0]["content"] for r in requests if "q3?" in r["messages"][1]["content"]]
    assert systems == ["system of single-v1", "system of single-v1-multi-turn"]
    (bench / "reference_answer_gpt-4.jsonl").unlink()
    with serving(lambda body, number: completion("[[5]]")) as (url, _):
        assert "question 2, 3" in judged(url, output="other")[2]


def test_answer_files_that_are_not_this_runs(judged, tmp_path):
    mixed = write(tmp_path / "mixed.jsonl", [line(1, "a", ["x", "y"]), line(2, "b", ["x", "y"])])
    short = answers(tmp_path, "short", numbers=(1, 2, 3))
    one_turn = write(tmp_path / "one.jsonl", [line(n, "one", ["x"]) for n in (1, 2, 3, 4)])
    twice = write(tmp_path / "twice.jsonl", [line(n, "twice", ["x", "y"]) for n in (1, 2, 3, 4, 4)])
    odd = write(tmp_path / "odd.jsonl", [{"question_id": 1, "text": "hello"}])
    for file, message in (
        (mixed, "holds answers of b, not only of a"),
        (short, "short has not answered question 4 in all turns"),
        (one_turn, "one has not answered question 1, 2, 3, 4 in all turns"),
        (twice, "answers question 4 twice"),
        (odd, "item 1 is no answer in MT-Bench's layout"),
        (tmp_path / "none.jsonl", "no such file of answers"),
    ):
        status, _, _, error = judged(None, file=file, output=f"out_{file.stem}")
        assert status == 2 and message in error and len(error.splitlines()) == 1, file
    assert judged(None)[0] == 0
    status, _, _, error = judged(None, file=answers(tmp_path, "theirs"))
    assert status == 2 and "holds answers of another run" in error and "--overwrite" in error
    assert judged(None, "--overwrite", file=answers(tmp_path, "theirs"))[0] == 0
    assert [p.name for p in (tmp_path / "out/model_answer").iterdir()] == ["theirs.jsonl"]
    with serving(lambda body, number: completion("[[A]]")) as (url, requests):
        status, _, _, error = judged(url, "--against", str(tmp_path / "theirs.jsonl"), file=tmp_path / "theirs.jsonl")
        assert status == 2 and "holds answers of theirs, as this run does" in error and not requests


def test_a_model_answers_and_goes_on_where_it_was(tiny_folder, bench, tmp_path, capsys):
    """Both turns, the published temperatures, batches; a run that was stopped ends with the very same answers."""

    def run(output, *more):
        words = ["evaluate", "--task", "mt_bench", "--questions", str(bench), "--model", str(tiny_folder), "--max_new_tokens", "6"]
        status = main([*words, "--template", "instruction", "--batch_size", "2", "--output", str(tmp_path / output), *more])
        return status, capsys.readouterr()

    def turns(path):
        return {row["question_id"]: row["choices"][0]["turns"] for row in map(json.loads, path.read_text().splitlines())}

    status, said = run("a")
    assert status == 0 and "no judge" in said.out and "4 questions answered" in said.out
    (file,) = (tmp_path / "a/model_answer").iterdir()
    whole = turns(file)
    assert set(whole) == {1, 2, 3, 4} and all(len(t) == 2 for t in whole.values())
    lines = file.read_text().splitlines(True)
    file.write_text("".join(lines[:2]) + lines[2][:20])
    status, said = run("a")
    assert status == 0 and "2 questions answered" in said.out and turns(file) == whole
    assert "questions answered" not in run("a")[1].out
    status, said = run("a", "--seed", "1")
    assert status == 2 and "holds answers of another run (seed 0 there, 1 here)" in said.err
    with serving(lambda body, number: completion("[[2]]")) as (url, requests):
        status, said = run("a", "--judge", url, "--judge_model", "j")
    assert status == 0 and len(requests) == 8 and json.loads((tmp_path / "a/results.json").read_text())["single"]
    first = next(r for r in requests if "q1?" in r["messages"][1]["content"])
    assert whole[1][0] in first["messages"][1]["content"]


def test_the_chat_template_and_the_instruction_prompt(tiny_tokenizer):
    from doratune.judging.answers import conversation_ids

    text = tiny_tokenizer.decode(conversation_ids(tiny_tokenizer, ["one?", "two?"], ["first"], "instruction"))
    assert text.endswith("### Instruction:\none?\n\n### Response:\nfirst\n\n### Instruction:\ntwo?\n\n### Response:\n")
    chat = tiny_tokenizer.decode(conversation_ids(tiny_tokenizer, ["one?", "two?"], ["first"], "chat"))
    assert chat.index("one?") < chat.index("first") < chat.index("two?") and "###" not in chat


def test_a_question_longer_than_the_model(tiny_folder, bench, tmp_path, capsys):
    rows = [json.loads(row) for row in (bench / "question.jsonl").read_text().splitlines()]
    rows[1]["turns"][1] = "why? " * 200
    write(bench / "question.jsonl", rows)
    words = ["evaluate", "--task", "mt_bench", "--questions", str(bench), "--model", str(tiny_folder), "--max_new_tokens", "4"]
    assert main([*words, "--output", str(tmp_path / "o")]) == 2
    assert "turn 2 of question 2 has" in (error := capsys.readouterr().err) and "positions" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "[mt_bench, boolq]"], "mt_bench is evaluated by itself"),
        (["--task", "boolq", "--judge", "http://x"], "judge is 'http://x', which is for --task mt_bench"),
        (["--task", "mt_bench"], "neither model, adapter nor answers is set"),
        (["--task", "mt_bench", "--model", "m", "--answers", "a"], "give one of --answers FILE and --model or --adapter"),
        (["--task", "mt_bench", "--model", "m", "--judge", "http://x"], "judge and judge_model belong together"),
        (["--task", "mt_bench", "--model", "m", "--against", "a"], "against needs a judge"),
        (["--task", "mt_bench", "--model", "m", "--protocol", "paper"], "protocol and beams are not for mt_bench"),
        (["--task", "mt_bench", "--model", "m", "--questions", "none"], "none: no such folder"),
        (["--task", "mt_bench", "--model", "m", "--mirror", "http://127.0.0.1:9"], "cannot be fetched"),
    ],
)
def test_mistakes(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["evaluate", *options, "--output", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("question.jsonl", '{"question_id": "1", "category": "math", "turns": ["a"]}', "item 1: question_id is '1'"),
        ("question.jsonl", '{"question_id": 1, "category": "", "turns": ["a"]}', "item 1: category is ''"),
        ("question.jsonl", '{"question_id": 1, "category": "math", "turns": "a"}', "item 1 has no list of one or two texts"),
        ("question.jsonl", '{"question_id": 1, "category": "math", "turns": ["a", "b", "c"]}', "no list of one or two texts"),
        ("question.jsonl", "", "is empty"),
        ("judge_prompts.jsonl", '{"name": "single-v1"}', "item 1 is no judge prompt"),
        ("judge_prompts.jsonl", '{"name": "x", "system_prompt": "", "prompt_template": ""}', "has no prompt 'single-v1'"),
        ("reference_answer_gpt-4.jsonl", '{"question_id": 1}', "item 1 is no answer in MT-Bench's layout"),
    ],
)
def test_files_that_are_not_mt_benchs(file, content, message, judged, bench):
    (bench / file).write_text(content)
    with serving(lambda body, number: completion("[[1]]")) as (url, requests):
        status, _, _, error = judged(url)
    assert status == 2 and message in error and len(error.splitlines()) == 1 and not requests


def test_the_published_files(shared_data):
    """80 questions, the published temperatures, every prompt that a case needs, with reference for math, reasoning and coding."""
    from doratune.judging.cases import pair_cases, single_cases, without_reference
    from doratune.judging.questions import load_bench

    bench = load_bench(shared_data / "mt_bench")
    texts = {q.number: ["first {x}", "second"] for q in bench.questions}
    singles, pairs = single_cases(bench, "a", texts), pair_cases(bench, ("a", texts), ("b", texts))
    assert (len(bench.questions), len(singles), len(pairs)) == (80, 160, 320) and without_reference(bench) == []
    names = {(c.question.category in ("math", "reasoning", "coding"), c.turn): c.prompt.name for c in singles}
    assert names == {
        (False, 1): "single-v1", (False, 2): "single-v1-multi-turn", (True, 1): "single-math-v1",
        (True, 2): "single-math-v1-multi-turn",
    }  # fmt: skip
    assert {q.category: q.temperature for q in bench.questions} == {
        "writing": 0.7, "roleplay": 0.7, "reasoning": 0.0, "math": 0.0, "coding": 0.0, "extraction": 0.0, "stem": 0.1,
        "humanities": 0.1,
    }  # fmt: skip
    assert len(load_bench(shared_data / "mt_bench", limit=2).questions) == 16
