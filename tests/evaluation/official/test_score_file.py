"""`eval/score.py`: both protocols on the same files, what it writes, and one clear line for a mistake."""

import json
import runpy
import sys
from hashlib import sha256 as sha256_of
from pathlib import Path
from typing import Any

import pytest
from official_files import write_answers, write_json, write_rows

from llava_cmoe.evaluation.official.files import ScoringError
from llava_cmoe.evaluation.official.score_file import score_file
from llava_cmoe.evaluation.scorers import PROTOCOLS

SCRIPT = Path(__file__).parents[3] / "eval/score.py"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_answers(tmp_path / "merge.jsonl", ("b.jpg", "Unanswerable."), ("a.jpg", "the soup"), ("c.jpg", ""))
    return write_rows(tmp_path, "val.json", {"a.jpg": "soup", "b.jpg": "unanswerable", "c.jpg": "can"})


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, **changed: Any) -> Path:
    options = {"task": "vizwiz", "annotations": folder, "answers": folder / "merge.jsonl"} | changed
    output = folder / "out" / "out.json"
    words = [word for name, given in (options | {"output": output}).items() for word in (f"--{name}", str(given))]
    monkeypatch.setattr(sys, "argv", ["score.py", *words])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert left.value.code in (0, None), left.value.code
    return output


@pytest.mark.parametrize(("protocol", "accuracy", "scores"), [("strict", 66.67, [1, 1, 0]), ("coin", 0, [0, 0, 0])])
def test_what_is_written(monkeypatch, capsys, folder: Path, protocol: str, accuracy: float, scores: list[int]) -> None:
    output = run(monkeypatch, folder, protocol=protocol)
    document = json.loads(output.read_text())
    assert document.pop("per_question") == dict(zip(("a.jpg", "b.jpg", "c.jpg"), scores, strict=True))
    assert document.pop("accuracy") == pytest.approx(accuracy, abs=0.01)
    sha256 = {name: sha256_of((folder / name).read_bytes()).hexdigest() for name in ("merge.jsonl", "val.json")}
    assert document.pop("answers_sha256") == sha256.pop("merge.jsonl") and document.pop("annotations") == sha256
    assert document == {
        "task": "VizWiz", "protocol": protocol, "version": PROTOCOLS[protocol].version, "accuracy_unit": "percent",
        "num_samples": 3, "detail": {}, "answers": "merge.jsonl",
    }  # fmt: skip
    assert capsys.readouterr().out == f"Samples: 3\nAccuracy: {accuracy:.2f}%\n"
    assert [path.name for path in output.parent.iterdir()] == ["out.json"]


def test_strict_is_what_is_asked_for_where_nothing_is_said(monkeypatch, folder: Path) -> None:
    assert json.loads(run(monkeypatch, folder).read_text())["protocol"] == "strict"


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"task": "refcoco"}, "unknown task 'refcoco'"),
        ({"task": "GQA", "protocol": "coin"}, "testdev_balanced_questions.json: cannot be read"),
        ({"answers": "nowhere.jsonl"}, "nowhere.jsonl: cannot be read"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(monkeypatch, folder, changed, complaint) -> None:
    with pytest.raises(AssertionError, match=f"error: .*{complaint}"):
        run(monkeypatch, folder, **changed)
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("answers", "complaint"),
    [
        ([("a.jpg", "x"), ("b.jpg", "x")], "missing id 'c.jpg' .*answer every row of val.json once"),
        ([("a.jpg", "x"), ("b.jpg", "x"), ("c.jpg", "x"), ("c.jpg", "x")], "doubled id 'c.jpg'"),
        ([("a.jpg", "x"), ("b.jpg", "x"), ("c.jpg", "x"), ("d.jpg", "x")], "unknown id 'd.jpg'"),
        ([("a.jpg", None)], r":1: question_id 'a.jpg' and text None do not fit.*mend the line"),
        ([([1], "x")], r":1: question_id \[1\]"),
    ],
)
def test_strict_wants_every_question_answered_once(folder: Path, answers: list, complaint: str) -> None:
    write_answers(folder / "merge.jsonl", *answers)
    with pytest.raises(ScoringError, match=rf"merge\.jsonl.*{complaint}"):
        score_file("VizWiz", folder, folder / "merge.jsonl", "strict")


def test_a_line_without_an_id_is_named_by_its_number(folder: Path) -> None:
    (folder / "merge.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(ScoringError, match=r"merge\.jsonl:1: no 'question_id'"):
        score_file("VizWiz", folder, folder / "merge.jsonl", "strict")


def test_strict_ids_are_compared_as_text(tmp_path: Path) -> None:
    write_rows(tmp_path, "val.json", {1: "two", "2": "no"})
    score = score_file("VQAv2", tmp_path, write_answers(tmp_path / "m.jsonl", ("1", "two"), (2, "No.")), "strict")
    assert (score.accuracy, score.per_question) == (100.0, {"1": 1.0, "2": 1.0})


def test_strict_grounding_adds_the_mean_overlap(tmp_path: Path) -> None:
    write_json(tmp_path, "test.json", [{"question_id": 1, "answer_bbox": "[0, 0, 1, 1]"}])
    score = score_file("Grounding", tmp_path, write_answers(tmp_path / "m.jsonl", (1, "[0, 0, 1, 0.5]")), "strict")
    assert (score.accuracy, score.detail["iou"]) == (100.0, 0.5)


def test_strict_needs_no_file_that_only_the_released_script_reads(tmp_path: Path) -> None:
    write_rows(tmp_path, "test.json", {"1": "Yes"})
    score = score_file("GQA", tmp_path, write_answers(tmp_path / "m.jsonl", ("1", "yes")), "strict")
    assert (score.accuracy, list(score.annotations)) == (100.0, ["test.json"])
