"""Protocol `strict` takes the truth from the official files, each row once, and says what they lack."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st
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
        ({"question_id": "1", "answer": "yes"}, "id '1' occurs in an earlier row, 0"),
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


@pytest.mark.parametrize("value", ["yes", {"A": "yes"}, 5, [["yes"]], [None], True])
@pytest.mark.parametrize(
    ("task", "key", "file"),
    [("ScienceQA", "choices", "problems.json"), ("TextVQA", "answers", "TextVQA_0.5.1_val.json")],
)
def test_what_is_no_list_of_texts_is_never_read_by_letters(
    value: object, task: str, key: str, file: str, tmp_path: Path
) -> None:
    entry = {"question_id": 4, key: value}
    write_json(tmp_path, file, {"4": entry} if task == "ScienceQA" else {"data": [entry]})
    for name in ("test.json", "val.json"):
        write_rows(tmp_path, name, {4: "A"})
    with pytest.raises(ScoringError, match=rf"{file}: .*'4': `{key}` (is one text|must be a list of texts)"):
        references_of(task, Annotations(tmp_path))


@given(st.lists(st.integers(0, 5), min_size=2, max_size=8))
def test_a_question_that_is_annotated_twice_is_an_error_with_both_places(ids: list[int]) -> None:
    with TemporaryDirectory() as folder:
        entries = [{"question_id": number, "answers": [f"x{place}"] * 10} for place, number in enumerate(ids)]
        write_json(Path(folder), "TextVQA_0.5.1_val.json", {"data": entries})
        write_rows(Path(folder), "val.json", dict.fromkeys(ids, "x"))
        if len(set(ids)) == len(ids):
            assert len(references_of("TextVQA", Annotations(Path(folder)))) == len(ids)
        else:
            with pytest.raises(
                ScoringError, match=r"TextVQA_0.5.1_val.json: entries \d and \d have the same question_id"
            ):
                references_of("TextVQA", Annotations(Path(folder)))


@pytest.mark.parametrize("task", ["ScienceQA", "GQA"])
def test_a_key_that_occurs_twice_is_an_error_in_strict_and_the_last_one_as_released(task: str, tmp_path: Path) -> None:
    write_rows(tmp_path, "test.json", {4: "A"})
    if task == "ScienceQA":
        (tmp_path / "problems.json").write_text('{"4": {"choices": ["a", "b"]}, "4": {"choices": ["b", "a"]}}')
    else:
        (tmp_path / "test.json").write_text('[{"question_id": 4, "answer": "a", "answer": "b"}]')
    with pytest.raises(ScoringError, match=r"key '(4|answer)' occurs twice in .*as its entries \d and \d; keep one"):
        references_of(task, Annotations(tmp_path))
    assert Annotations(tmp_path).load("problems.json" if task == "ScienceQA" else "test.json")


@pytest.mark.parametrize("answer", ["b", "C", "AB"])
def test_a_row_that_the_scorer_could_not_judge_is_an_error_with_its_place(answer: str, tmp_path: Path) -> None:
    write_json(tmp_path, "problems.json", {"4": {"choices": ["yes", "no"]}, "5": {"choices": ["yes", "no"]}})
    write_rows(tmp_path, "test.json", {"4": "B", "5": answer})
    with pytest.raises(
        ScoringError, match=rf"test\.json, row 1: the answer '{answer}' to question '5' is not the letter"
    ):
        references_of("ScienceQA", Annotations(tmp_path))
