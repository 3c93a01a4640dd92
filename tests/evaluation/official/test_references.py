"""Protocol `strict` takes the truth from the official files, each row once, and says what they lack."""

from pathlib import Path

import pytest
from official_files import write_json, write_rows

from llava_cmoe.evaluation.official.files import Annotations, ScoringError
from llava_cmoe.evaluation.official.references import references_of
from llava_cmoe.evaluation.scorers import Reference


def test_scienceqa_takes_its_choices_from_the_problems(tmp_path: Path) -> None:
    write_json(tmp_path, "problems.json", {"4": {"choices": ["yes", 5], "answer": 1}})
    write_rows(tmp_path, "test.json", {4: "B"})
    assert references_of("ScienceQA", Annotations(tmp_path)) == [Reference("B", id="4", choices=("yes", "5"))]


def test_textvqa_takes_the_ten_answers_and_nothing_from_its_rows(tmp_path: Path) -> None:
    write_json(tmp_path, "TextVQA_0.5.1_val.json", {"data": [{"question_id": 4, "answers": ["x"] * 10}]})
    write_json(tmp_path, "val.json", [{"question_id": "4", "text": "?"}])
    assert references_of("TextVQA", Annotations(tmp_path)) == [Reference(id="4", answers=("x",) * 10)]


def test_grounding_takes_a_box(tmp_path: Path) -> None:
    write_json(tmp_path, "test.json", [{"question_id": 1, "answer_bbox": "[0, 0.5, 1, 1]", "size": [2, 1]}])
    assert references_of("Grounding", Annotations(tmp_path)) == [Reference(id="1", box=(0, 0.5, 1, 1))]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"answer": "yes"}, "no id"),
        ({"question_id": 2}, "no answer"),
        ({"question_id": 2, "answer": " "}, "no answer"),
        ({"question_id": 2, "answer": 5}, "no answer"),
        ({"question_id": "1", "answer": "yes"}, "id '1' occurs in an earlier row"),
        ("yes", "a row is an object"),
    ],
)
def test_a_row_that_is_not_as_published_is_an_error_with_its_place(row: object, complaint: str, tmp_path: Path) -> None:
    write_json(tmp_path, "test.json", [{"question_id": 1, "answer": "yes"}, row])
    with pytest.raises(ScoringError, match=rf"test\.json, row 1: .*{complaint}.*official file"):
        references_of("GQA", Annotations(tmp_path))


def test_a_row_without_its_annotation_is_an_error(tmp_path: Path) -> None:
    write_json(tmp_path, "problems.json", {"4": {"choices": ["yes"], "answer": 0}})
    write_rows(tmp_path, "test.json", {"5": "A"})
    with pytest.raises(ScoringError, match=r"test\.json, row 0: no entry for id '5' in problems\.json"):
        references_of("ScienceQA", Annotations(tmp_path))


@pytest.mark.parametrize("document", [[], {}, None])
def test_a_file_without_rows_is_an_error(document: object, tmp_path: Path) -> None:
    write_json(tmp_path, "test.json", document)
    with pytest.raises(ScoringError, match=r"test\.json: no array of rows"):
        references_of("GQA", Annotations(tmp_path))


def test_annotations_of_another_kind_are_an_error_with_their_name(tmp_path: Path) -> None:
    write_json(tmp_path, "TextVQA_0.5.1_val.json", {"data": [{"question_id": 1}]})
    write_rows(tmp_path, "val.json", {"1": "x"})
    with pytest.raises(ScoringError, match=r"TextVQA_0\.5\.1_val\.json: no 'answers'"):
        references_of("TextVQA", Annotations(tmp_path))
