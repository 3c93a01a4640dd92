"""CoIN's scripts on files: what each counts, how ids are compared, and what stops it."""

import json
from pathlib import Path
from typing import Any

import pytest
from official_files import write_answers, write_json, write_rows

from llava_cmoe.evaluation.official.files import ScoringError
from llava_cmoe.evaluation.official.score_file import FileScore, score_file

NAN = float("nan")


def coin(task: str, folder: Path, *answers: tuple[Any, Any]) -> FileScore:
    return score_file(task, folder, write_answers(folder / "merge.jsonl", *answers), "coin")


def outcome(score: FileScore) -> tuple[float, int, dict[str, float]]:
    return score.accuracy, score.num_samples, score.per_question


@pytest.fixture
def science(tmp_path: Path) -> Path:
    problems = {str(i): {"choices": ["x"] * 3, "answer": i} for i in range(3)} | {"9": {"choices": ["x"], "answer": 0}}
    write_json(tmp_path, "problems.json", problems)
    return write_json(tmp_path, "pid_splits.json", {"train": ["9"], "test": ["0", "1", "2", "1"]})


def test_scienceqa_is_measured_on_the_split_and_the_last_of_repeated_answers_stands(science: Path) -> None:
    score = coin("ScienceQA", science, ("0", "B"), ("0", "A"), ("1", "It's B."), ("9", None), ("unknown", "A"))
    assert outcome(score) == (1 / 3 * 100, 3, {"0": 1.0, "1": 0.0, "2": 0.0})
    assert list(score.annotations) == ["pid_splits.json", "problems.json"]


def test_a_scienceqa_id_that_is_no_text_answers_nothing(science: Path) -> None:
    assert coin("scienceqa", science, (0, "A"), (1, "B"), (2, "C")).accuracy == 0.0


def test_no_answer_at_all_is_a_number_in_scienceqa_and_an_error_elsewhere(science: Path, tmp_path: Path) -> None:
    assert coin("ScienceQA", science).accuracy == 0.0
    write_rows(tmp_path, "test.json", {"1": "cat"})
    with pytest.raises(ScoringError, match=r"merge\.jsonl: there is nothing to take a mean over"):
        coin("ImageNet", tmp_path)


@pytest.mark.parametrize("answer", [5, -6, "A", 1.0, None])
def test_a_scienceqa_truth_that_is_no_option_stops_the_script(science: Path, answer: Any) -> None:
    write_json(science, "problems.json", {pid: {"choices": ["x"], "answer": answer} for pid in "012"})
    with pytest.raises(ScoringError, match=r"problems\.json, problem '0': "):
        coin("ScienceQA", science, ("1", "B"))


def test_a_scienceqa_answer_needs_its_prompt(science: Path) -> None:
    (science / "merge.jsonl").write_text('{"question_id": "0", "text": "A"}\n')
    with pytest.raises(ScoringError, match=r"merge\.jsonl:1: no 'prompt'"):
        score_file("ScienceQA", science, science / "merge.jsonl", "coin")


def test_scienceqa_with_a_truth_counted_from_the_end_rewards_what_cannot_be_read(science: Path) -> None:
    write_json(science, "problems.json", {pid: {"choices": ["x"] * 5, "answer": -1} for pid in "012"})
    assert coin("ScienceQA", science, ("0", "E"), ("1", "dog")).per_question == {"0": 0.0, "1": 1.0, "2": 1.0}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    rows = [
        {"question_id": 34602, "answers": ["nokia"] * 3 + ["the nokia"] + ["x"] * 6},
        {"question_id": "7", "answers": ["a"] + ["b c"] * 9},
        {"question_id": 8, "answers": ["x"] * 9},
    ]
    return write_json(tmp_path, "TextVQA_0.5.1_val.json", {"data": rows})


def test_textvqa_ids_are_compared_as_text_and_every_answer_counts(text: Path) -> None:
    score = coin("TextVQA", text, ("34602", "Nokia"), (7, ""), (7, "x"), ("7", "B-C"))
    assert outcome(score) == (pytest.approx(57.5), 4, {"34602": 1.0, "7": 1.0})


@pytest.mark.parametrize(
    ("question_id", "answer", "complaint"),
    [
        (9, "x", "TextVQA_0.5.1_val.json holds no question '9'"),
        (34602, None, "question 34602 of TextVQA_0.5.1_val.json: "),
        (8, "x", "9 annotators' answers where ten are needed"),
    ],
)
def test_textvqa_stops_at(text: Path, question_id: Any, answer: Any, complaint: str) -> None:
    with pytest.raises(ScoringError, match=rf"merge\.jsonl:2.*{complaint}"):
        coin("TextVQA", text, (7, "x"), (question_id, answer))


def test_imagenet_goes_by_place_and_ignores_ids_and_rows_that_are_left_over(tmp_path: Path) -> None:
    write_rows(tmp_path, "test.json", {"1": "cat", "2": "Dog", "3": "owl"})
    score = coin("ImageNet", tmp_path, ("2", "a cat"), ("1", "dog"))
    assert outcome(score) == (50.0, 2, {"2": 1.0, "1": 0.0})
    (tmp_path / "merge.jsonl").write_text('{"text": ""}\n{"text": ["Dog"]}\n')
    score = score_file("ImageNet", tmp_path, tmp_path / "merge.jsonl", "coin")
    assert outcome(score) == (100.0, 2, {"0": 1.0, "1": 1.0})


@pytest.mark.parametrize("answers", [[("1", "x"), ("1", "x"), ("1", "x")], [("1", "x"), ("2", None)]])
def test_imagenet_stops_at_more_answers_than_rows_and_at_what_is_no_text(tmp_path: Path, answers: list) -> None:
    write_rows(tmp_path, "test.json", {"1": "cat", "2": "dog"})
    with pytest.raises(ScoringError, match=rf"merge\.jsonl:{len(answers)}: "):
        coin("ImageNet", tmp_path, *answers)


def test_gqa_is_measured_on_the_distinct_questions_that_are_answered(tmp_path: Path) -> None:
    questions = {"1": {"answer": "yes", "isBalanced": True}, "2": {"answer": "left"}, "3": {"answer": "cat"}}
    write_json(tmp_path, "testdev_balanced_questions.json", questions)
    score = coin("gqa", tmp_path, ("1", "no"), ("2", "right"), ("1", "Yes."))
    assert outcome(score) == (50.0, 2, {"1": 1.0, "2": 0.0})


def test_gqa_leaves_out_questions_that_are_not_balanced(tmp_path: Path) -> None:
    questions = {"1": {"answer": "yes", "isBalanced": False}, "2": {"answer": "left", "isBalanced": True}}
    write_json(tmp_path, "testdev_balanced_questions.json", questions)
    assert outcome(coin("gqa", tmp_path, ("1", "no"), ("2", "left"))) == (100.0, 1, {"2": 1.0})


@pytest.mark.parametrize("question_id", [1, "3", None, ["1"]])
def test_gqa_stops_at_an_id_that_is_not_among_the_questions(tmp_path: Path, question_id: Any) -> None:
    write_json(tmp_path, "testdev_balanced_questions.json", {"1": {"answer": "yes"}})
    with pytest.raises(ScoringError, match=r"merge\.jsonl:1: "):
        coin("GQA", tmp_path, (question_id, "yes"))


@pytest.mark.parametrize(("task", "name"), [("VizWiz", "val.json"), ("OCRVQA", "test.json")])
def test_ids_are_compared_as_they_are(task: str, name: str, tmp_path: Path) -> None:
    write_rows(tmp_path, name, [(1, "cat"), ("1", "dog"), (NAN, "owl")])
    score = coin(task, tmp_path, (1, "cat"), (1.0, "CAT"), (True, "cat"), ("1", "dog"), (NAN, "owl"))
    assert (score.accuracy, score.num_samples) == (100.0, 5)
    with pytest.raises(ScoringError, match=rf"merge\.jsonl:1: {name} holds no question '1.0'"):
        coin(task, tmp_path, ("1.0", "cat"))


def test_vqav2_ids_are_compared_as_text(tmp_path: Path) -> None:
    write_rows(tmp_path, "val.json", [(1, "cat"), ("2", "dog"), (1, "owl")])
    score = coin("VQAv2", tmp_path, ("1", "Owl"), (2, "dog"), (2, "cat"))
    assert outcome(score) == (pytest.approx(200 / 3), 3, {"1": 1.0, "2": 0.0})
    with pytest.raises(ScoringError, match=r"merge\.jsonl:1: val\.json holds no question '1\.0'"):
        coin("VQAv2", tmp_path, (1.0, "owl"))


def test_ocrvqa_does_not_look_at_the_truth_of_a_list_that_holds_the_word(tmp_path: Path) -> None:
    write_rows(tmp_path, "test.json", {"1": "cat"})
    assert coin("OCRVQA", tmp_path, ("1", ["Unanswerable"])).accuracy == 0.0
    with pytest.raises(ScoringError, match=r"merge\.jsonl:1, question '1' of test\.json: "):
        coin("OCRVQA", tmp_path, ("1", ["cat"]))


@pytest.fixture
def boxes(tmp_path: Path) -> Path:
    row = {"answer_bbox": "[0.0, 0.0, 1.0, 1.0]", "size": [640, 480]}
    rows = [{"question_id": 1, **row}, {"question_id": 2, **row, "answer_bbox": "[0, 0, 1]"}]
    return write_json(tmp_path, "test.json", [*rows, {"question_id": 3, **row, "size": []}])


def test_grounding_counts_what_holds_no_box_as_wrong(boxes: Path) -> None:
    score = coin("Grounding", boxes, (1, "(0, 0, 1, 1)"), (1, "[0, 0, 1, 1]"), (1, None), (3, "no box"), (2, "none"))
    assert outcome(score) == (20.0, 5, {"1": 0.0, "3": 0.0, "2": 0.0})


@pytest.mark.parametrize("question_id", [2, 3, 4, "1"])
def test_grounding_stops_at_a_broken_row_only_where_a_box_is_compared_with_it(boxes: Path, question_id: Any) -> None:
    with pytest.raises(ScoringError, match=r"merge\.jsonl:1"):
        coin("Grounding", boxes, (question_id, "(0, 0, 1, 1)"))


@pytest.mark.parametrize("task", ["VizWiz", "VQAv2", "OCRVQA", "Grounding"])
def test_an_official_file_without_ids_is_an_error_with_its_name(task: str, tmp_path: Path) -> None:
    for name in ("test.json", "val.json"):
        write_json(tmp_path, name, [{"answer": "cat"}])
    with pytest.raises(ScoringError, match=r"(test|val)\.json: no 'question_id'; .*official file"):
        coin(task, tmp_path, (1, "cat"))


def test_an_odd_id_stays_in_the_document(tmp_path: Path) -> None:
    write_rows(tmp_path, "val.json", [("\ud800", "cat")])
    score = coin("VizWiz", tmp_path, ("\ud800", "cat"))
    assert json.loads(json.dumps(score.model_dump()))["per_question"] == {"\ud800": 1.0}


@pytest.mark.parametrize(("task", "printed"), [("VizWiz", "14.38"), ("GQA", "14.37")])
def test_the_last_printed_digit_is_that_of_the_script(task: str, printed: str, tmp_path: Path) -> None:
    """23 of 160 is exactly 14.375; the scripts take the mean before or after multiplying by a hundred."""
    ids = [str(number) for number in range(160)]
    write_rows(tmp_path, "val.json", dict.fromkeys(ids, "yes"))
    write_json(tmp_path, "testdev_balanced_questions.json", {i: {"answer": "yes"} for i in ids})
    score = coin(task, tmp_path, *((i, "yes" if int(i) < 23 else "no") for i in ids))
    assert f"{score.accuracy:.2f}" == printed
