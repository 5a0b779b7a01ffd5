"""Published benchmarks of questions about images: the score of hand-made answer files is what was worked out by hand; answer files
of other questions, and files of other layouts, are one line."""

import json

import pytest

from doratune.cli.main import main
from doratune.errors import UserError
from doratune.evaluation.answers import evaluate_answers
from doratune.evaluation.benchmarks import benchmarks
from doratune.evaluation.kinds.options import option_of
from doratune.evaluation.tasks import load_task
from doratune.evaluation.vqa import CONTRACTIONS, normalized, soft_score, text_normalized


def write(path, value, lines=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, value)) if lines else json.dumps(value))
    return path


def ten(**counts):
    """Ten people's answers: ten(red=7, blue=3)."""
    return [{"answer": word, "answer_confidence": "yes"} for word, count in counts.items() for _ in range(count)]


NORMALIZED = {
    "The two dogs, isnt it?": "2 dogs isn't it",
    "A man.": "man",
    "none": "0",
    "1,000": "1000",
    "1.5": "1.5",
    "1.5.": "1.5",
    "black-and-white": "black and white",
    "black - white": "black white",
    "yes!": "yes",
    "\tred\nball ": "red ball",
    "couldntve": "couldntve",
    "couldn'tve": "couldn't've",
    "couldnt've": "couldn't've",
    "yall'd've": "y'all'd've",
    "somebody'd": "somebodyd",
    "shes": "shes",  # the official table has no such word
    "im": "im",
    "man's": "man's",
    "An the a": "",
    "Ten TEN ten": "10 10 10",
}


@pytest.mark.parametrize("text", NORMALIZED)
def test_the_official_normalization(text):
    assert normalized(text) == NORMALIZED[text]


def test_the_table_of_contractions():
    assert len(CONTRACTIONS) == 114
    assert all(key.replace("'", "") == word.replace("'", "") for key, word in CONTRACTIONS.items())
    assert not {"lets", "shes", "im", "ive", "id've"} & CONTRACTIONS.keys()


def test_textvqas_own_normalization():
    assert text_normalized("Coca-Cola's, really?") == "coca cola 's really"
    assert text_normalized("1,000 the") == "1000"
    assert normalized("cola's") == "cola's"


@pytest.mark.parametrize(
    ("answer", "people", "score"),
    [
        ("red", ["red"] * 10, 1.0),
        ("red", ["red"] * 3 + ["blue"] * 7, (3 * 2 / 3 + 7 * 1) / 10),  # 0.9: left out, a red one has two others
        ("red", ["red"] * 2 + ["blue"] * 8, (2 * 1 / 3 + 8 * 2 / 3) / 10),  # 0.6
        ("red", ["red"] + ["blue"] * 9, (0 + 9 / 3) / 10),  # 0.3
        ("red", ["red"] * 4 + ["blue"] * 6, 1.0),
        ("the Red.", ["red"] * 2 + ["a red"] * 2 + ["blue"] * 6, 1.0),
        ("", ["red"] * 10, 0.0),
        ("Yes.", ["yes"] * 10, 1.0),
        ("a dog", ["a dog"] * 10, 1.0),
        ("green", ["red"] * 5 + ["blue"] * 5, 0.0),
    ],
)
def test_soft_accuracy(answer, people, score):
    assert soft_score(answer, people) == pytest.approx(score, abs=1e-12)
    assert soft_score(answer, people[::-1]) == pytest.approx(score, abs=1e-12)


def vqav2(folder):
    questions = [{"question_id": n, "image_id": 10 + n, "question": f"What is {n}?"} for n in (1, 2, 3)]
    answers = [ten(red=10), ten(red=3, blue=7), ten(two=5, dogs=5)]
    write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions, "data_subtype": "val2014"})
    annotations = [{"question_id": n, "answers": a} for n, a in zip((3, 1, 2), (answers[2], answers[0], answers[1]))]
    write(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    return [{"question_id": n, "answer": a} for n, a in ((3, "The 2"), (1, "blue"), (2, "red"))], {"accuracy": 1.9 / 3, "right": 1}


def textvqa(folder):
    data = [
        {"question_id": 5, "image_id": "a1", "question": "what brand?", "answers": ["coca cola 's"] * 4 + ["pepsi"] * 6},
        {"question_id": 6, "image_id": "a2", "question": "what time?", "answers": ["2:10"] + ["ten past"] * 9},
    ]
    write(folder / "TextVQA_0.5.1_val.json", {"data": data, "dataset_type": "val"})
    return [{"question_id": 5, "text": "Coca-Cola's"}, {"question_id": 6, "text": "2:10"}], {"accuracy": 1.3 / 2, "right": 1}


def vizwiz(folder):
    unanswerable = [{"image": f"v{n}.jpg", "question": "What is it?", "answers": ten(unanswerable=n, can=10 - n)} for n in (2, 10)]
    write(folder / "val.json", unanswerable)
    return [{"image": "v10.jpg", "answer": "Unanswerable"}, {"image": "v2.jpg", "answer": "unanswerable"}], {"accuracy": 1.6 / 2}


def gqa(folder):
    questions = {
        "q1": {"imageId": "7", "question": "Who?", "answer": "woman", "isBalanced": True},
        "q2": {"imageId": "7", "question": "Left?", "answer": "yes", "isBalanced": True},
        "q3": {"imageId": "8", "question": "Where?", "answer": "left", "isBalanced": False},
    }
    write(folder / "testdev_balanced_questions.json", questions)
    predictions = [{"questionId": "q1", "prediction": "Woman."}, {"questionId": "q2", "prediction": "yes it is"}]
    return predictions, {"accuracy": 0.5, "majority": 0.5, "total": 2}


def science_qa(folder):
    problem = {"question": "Which?", "choices": ["one", "two", "three"], "hint": "Look."}
    problems = {
        "10": problem | {"answer": 1, "image": "image.png"},
        "11": problem | {"answer": 2, "image": None},
        "12": problem | {"answer": 0, "image": "image.png", "choices": ["one", "two"]},
        "99": problem | {"answer": 0, "image": None},
    }
    write(folder / "problems.json", problems)
    write(folder / "pid_splits.json", {"test": ["10", "11", "12"], "train": ["99"]})
    texts = {"10": "B", "11": "The answer is C.", "12": "one"}  # the last names no letter
    figures = {"accuracy": 2 / 3, "accuracy_with_image": 0.5, "unparsable": 1 / 3, "chance": (1 / 3 + 1 / 3 + 1 / 2) / 3}
    return [{"question_id": name, "prompt": "", "text": text} for name, text in texts.items()], figures


def mmbench(folder):
    head = ["index", "question", "hint", "A", "B", "C", "answer", "image"]
    rows = [
        ["1", "Which?", "nan", "red", "blue", "nan", "A", "aGk="],
        ["1000001", "Which?", "nan", "blue", "red", "nan", "B", "aGk="],
        ["2", "Where?", "", "left", "right", "up", "C", "aGk="],
        ["1000002", "Where?", "", "right", "up", "left", "B", "aGk="],
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mmbench_dev_20230712.tsv").write_text("\n".join("\t".join(row) for row in [head, *rows]))
    texts = {"1": "A", "1000001": "It is red", "2": "C. up", "1000002": "C"}
    figures = {"accuracy": 3 / 4, "circular_accuracy": 0.5, "chance": (1 / 2 + 1 / 3) / 2, "unparsable": 0}
    return [{"index": int(name), "prediction": text} for name, text in texts.items()], figures


def pope(folder):
    labels = {"random": ["yes", "yes", "no", "no"], "popular": ["yes", "no"]}
    for category, part in labels.items():
        lines = [{"question_id": n, "image": "COCO_1.jpg", "text": "Is there a dog?", "label": x} for n, x in enumerate(part, 1)]
        write(folder / f"coco_pope_{category}.json", lines, lines=True)
    texts = ["Yes, there is. No cat", "no", "Yes", "There is not"], ["Yes", "dog"]
    answers = [
        {"question_id": f"{category}/{n}", "text": text} for category, part in zip(labels, texts) for n, text in enumerate(part, 1)
    ]
    # random: yes no yes no of yes yes no no → P 1/2, R 1/2, F1 1/2; popular: yes yes of yes no → P 1/2, R 1, F1 2/3
    figures = {"accuracy": 3 / 6, "precision": 2 / 4, "recall": 2 / 3, "f1": (1 / 2 + 2 / 3) / 2, "yes_share": 4 / 6}
    return answers, figures | {"unparsable": 1 / 6, "chance": 0.5}


MAKERS = {
    "vqav2": vqav2,
    "textvqa": textvqa,
    "vizwiz": vizwiz,
    "gqa": gqa,
    "science_qa": science_qa,
    "mmbench": mmbench,
    "pope": pope,
}


def test_every_benchmark_has_a_hand_made_file():
    assert MAKERS.keys() == benchmarks().keys()


@pytest.mark.parametrize("name", MAKERS)
def test_scores_are_those_worked_out_by_hand(name, tmp_path, capsys):
    answers, figures = MAKERS[name](tmp_path / "data")
    file = write(tmp_path / "answers.jsonl", answers, lines=True)
    output = tmp_path / "out"
    command = ["evaluate", "--task", f"{name}:{tmp_path / 'data'}", "--answers", str(file), "--output", str(output), "--json"]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["results"][0]
    result = json.loads((output / "results.json").read_text())["results"][0]
    assert {key: result[key] for key in figures} == pytest.approx(figures, abs=1e-12)
    assert printed["accuracy"] == result["accuracy"]
    records = [json.loads(line) for line in (output / f"{name}.generate.jsonl").read_text().splitlines()]
    assert len(records) == result["total"] == len(answers)
    mean = sum(r.get("score", r["correct"]) for r in records) / len(records)
    assert mean == pytest.approx(result["accuracy"], abs=1e-12)


@pytest.mark.parametrize("name", MAKERS)
def test_the_order_and_the_container_of_an_answer_file_do_not_matter(name, tmp_path):
    answers, figures = MAKERS[name](tmp_path / "data")
    file = write(tmp_path / "answers.json", answers[::-1])
    summary = evaluate_answers([f"{name}:{tmp_path / 'data'}"], file, tmp_path / "out")
    assert summary["results"][0]["accuracy"] == pytest.approx(figures["accuracy"], abs=1e-12)


def spoiled(answers):
    """What is wrong with an answer file → (the file, words of the message)."""
    key = next(k for k in ("question_id", "questionId", "image", "index") if k in answers[0])
    text = next(k for k in ("answer", "text", "prediction") if k in answers[0])
    renamed = [{"id" if k == key else k: v for k, v in one.items()} for one in answers]
    return {
        "an answer too few": (answers[1:], "1 of"),
        "an answer too many": ([*answers, answers[0] | {key: "nobody"}], "1 answers are to other questions (the first: nobody)"),
        "another benchmark's": ([one | {key: f"x{n}"} for n, one in enumerate(answers)], "does not belong to these questions"),
        "twice": ([*answers, answers[0]], "is the second to question"),
        "no name": (renamed, "answer 1 has no"),
        "no text": ([{k: v for k, v in one.items() if k != text} for one in answers], "answer 1 has no"),
        "none at all": ([], "does not belong"),
        "no list": ({"answers": answers}, "no list of objects"),
    }


@pytest.mark.parametrize("name", MAKERS)
def test_an_answer_file_of_other_questions_is_one_line(name, tmp_path, capsys):
    answers, _ = MAKERS[name](tmp_path / "data")
    for number, (wrong, words) in enumerate(spoiled(answers).values()):
        file = write(tmp_path / f"wrong{number}.json", wrong)
        output = tmp_path / f"out{number}"
        command = ["evaluate", "--task", f"{name}:{tmp_path / 'data'}", "--answers", str(file), "--output", str(output)]
        assert main(command) == 2
        error = capsys.readouterr().err.strip()
        assert words in error and str(file) in error and "\n" not in error, error
        assert not output.exists()


@pytest.mark.parametrize("name", MAKERS)
def test_a_place_without_the_published_files_is_one_line(name, tmp_path):
    (tmp_path / "empty").mkdir()
    for task, words in (
        (name, f"give {name}:FOLDER with {benchmarks()[name].shown}"),
        (f"{name}:{tmp_path / 'nowhere'}", "no such file or folder"),
        (f"{name}:{tmp_path / 'empty'}", "holds no"),
    ):
        with pytest.raises(UserError, match=r"(?s)^[^\n]+$") as stop:
            load_task(task)
        assert words in str(stop.value)


@pytest.mark.parametrize("name", MAKERS)
def test_files_that_are_not_as_published_are_one_line(name, tmp_path):
    MAKERS[name](tmp_path / "data")
    for path in sorted((tmp_path / "data").iterdir()):
        before = path.read_bytes()
        for wrong in (b"", b"{", b"[1, 2]", b"{}", before[: len(before) // 2]):
            path.write_bytes(wrong)
            with pytest.raises(UserError, match=r"(?s)^[^\n]+$") as stop:
                load_task(f"{name}:{tmp_path / 'data'}")
            assert str(tmp_path) in str(stop.value)
        path.write_bytes(before)
    assert load_task(f"{name}:{tmp_path / 'data'}")[1]


def test_parts_without_published_answers_are_refused(tmp_path):
    vqav2(tmp_path / "v")
    (tmp_path / "v" / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(UserError, match="the test parts have none"):
        load_task(f"vqav2:{tmp_path / 'v'}")
    write(tmp_path / "z" / "val.json", [{"image": "a.jpg", "question": "?"}])
    with pytest.raises(UserError, match="a part without published answers cannot be scored here"):
        load_task(f"vizwiz:{tmp_path / 'z'}")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mmbench_test.tsv").write_text("index\tquestion\tA\tB\n1\tWhich?\tred\tblue\n")
    with pytest.raises(UserError, match="without published answers"):
        load_task(f"mmbench:{tmp_path / 'm'}")


def test_popes_questions_under_llavas_names(tmp_path):
    answers, figures = pope(tmp_path)
    lines = [
        {"question_id": 100 + n, "image": "COCO_1.jpg", "text": "?", "category": a["question_id"].split("/")[0]}
        for n, a in enumerate(answers)
    ]
    write(tmp_path / "llava_pope_test.jsonl", lines, lines=True)
    file = write(tmp_path / "answers.json", [{"question_id": 100 + n, "text": a["text"]} for n, a in enumerate(answers)])
    result = evaluate_answers([f"pope:{tmp_path}"], file, tmp_path / "out")["results"][0]
    assert {key: result[key] for key in figures} == pytest.approx(figures)
    write(tmp_path / "llava_pope_test.jsonl", [lines[0] | {"image": "COCO_2.jpg"}], lines=True)
    with pytest.raises(UserError, match="take one release"):
        load_task(f"pope:{tmp_path}")


@pytest.mark.parametrize(
    ("text", "letter"),
    [("B", "B"), ("B.", "B"), (" (B) ", "B"), ("B: blue", "B"), ("B. It is blue", "B"), ("The answer is B", "B")]
    + [("So the answer is (B).", "B"), ("It is Blue", "B"), ("red or blue", None), ("D", None), ("", None), ("Before", None)]
    + [("b", None), ("A or B", None), ("Blue-ish and more", "B")],
)
def test_option_letters(text, letter):
    assert option_of(text, ["red", "blue", "green"]) == letter


def test_option_letters_alone_count_in_scienceqa():
    assert option_of("It is blue", ["red", "blue"], letters_only=True) is None
    assert option_of("B", ["red", "blue"], letters_only=True) == "B"


def test_answers_are_for_one_benchmark_and_no_model(tmp_path, capsys):
    answers, _ = gqa(tmp_path / "data")
    file, task = write(tmp_path / "a.json", answers), f"gqa:{tmp_path / 'data'}"
    for flags, words in (
        (["--task", "boolq"], "such as --task vqav2:FOLDER"),
        (["--task", f"[{task}, {task}]"], "scored for one benchmark"),
        (["--task", task, "--model", "m"], "answers are there already"),
        (["--task", task, "--limit", "1"], "scored whole"),
    ):
        assert main(["evaluate", *flags, "--answers", str(file), "--output", str(tmp_path / "out")]) == 2
        assert words in capsys.readouterr().err
