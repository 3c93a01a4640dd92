"""Official files and answers files are read as they are; what is wrong with one is told with its place and a fix."""

from pathlib import Path

import pytest
from official_files import write_answers, write_json

from llava_cmoe.evaluation.official.files import Annotations, ScoringError, blamed, read_lines, task_named


@pytest.mark.parametrize("name", ["ScienceQA", "scienceqa", "SCIENCEQA"])
def test_a_task_is_found_in_any_case(name: str) -> None:
    assert task_named(name) == "ScienceQA"


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ScoringError, match="'refcoco'; it is one of: ScienceQA, .*OCRVQA"):
        task_named("refcoco")


def test_lines_keep_their_place_and_whatever_they_hold(tmp_path: Path) -> None:
    path = write_answers(tmp_path / "merge.jsonl", ("1", "line\u2028separator"), (2, None))
    lines = read_lines(path)
    assert [(line.place, line.answer["question_id"], line.answer["text"]) for line in lines] == [
        (f"{path}:1", "1", "line\u2028separator"),
        (f"{path}:2", 2, None),
    ]
    path.write_text("")
    assert read_lines(path) == []


@pytest.mark.parametrize("line", ["", "{", "[]", "3", "null", "\ufeff{}", '{"a": 1} {}'])
def test_a_line_that_is_no_object_is_an_error_with_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "merge.jsonl"
    path.write_text('{"question_id": 1}\n' + line + '\n{"question_id": 3}\n', encoding="utf-8")
    with pytest.raises(ScoringError, match=r"merge\.jsonl:2: .*mend or delete"):
        read_lines(path)


def test_a_missing_or_broken_file_is_an_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ScoringError, match=r"merge\.jsonl: cannot be read \(No such file"):
        read_lines(tmp_path / "merge.jsonl")
    with pytest.raises(ScoringError, match=r"problems\.json: cannot be read .*put the official file there"):
        Annotations(tmp_path).load("problems.json")
    (tmp_path / "problems.json").write_bytes(b"\xff{}")
    with pytest.raises(ScoringError, match=r"problems\.json: .*utf-8"):
        Annotations(tmp_path).load("problems.json")


def test_the_official_split_is_read_and_the_other_one_only_where_it_is_alone(tmp_path: Path) -> None:
    write_json(tmp_path, "test.json", ["test"])
    alone = Annotations(tmp_path)
    assert alone.rows("VizWiz") == ("test.json", ["test"])
    write_json(tmp_path, "val.json", ["val"])
    both = Annotations(tmp_path)
    assert (both.rows("VizWiz"), both.rows("GQA")) == (("val.json", ["val"]), ("test.json", ["test"]))
    assert both.read == ["val.json", "test.json"]


def test_an_error_of_ones_own_program_is_nobodys_file() -> None:
    with pytest.raises(AssertionError), blamed("merge.jsonl:1", "mend it"):
        raise AssertionError
