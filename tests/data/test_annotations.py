"""Captions in COCO's format give each evaluation row all captions of its picture; lists of answers are read."""

import json
from pathlib import Path

import pytest

from llava_cmoe.data.coin import read_eval
from llava_cmoe.data.problems import DataError
from llava_cmoe.data.tasks import TaskSequence, TaskSpec

CAPTIONS = ["a red thing", "something red"]


def captioned(root: Path, sequence: TaskSequence, file_name: str) -> TaskSpec:
    images = [{"id": 1, "file_name": "other.jpg"}, {"id": 2, "file_name": file_name}]
    document = {"images": images, "annotations": [{"image_id": 2, "caption": caption} for caption in CAPTIONS]}
    (root / "captions.json").write_text(json.dumps(document))
    changes = {"scorer": "captions", "annotations": "captions.json"}
    return TaskSpec.model_validate(sequence.tasks[1].model_dump() | changes)


def test_captions_are_joined_by_the_file_name_of_the_picture(root: Path, sequence: TaskSequence) -> None:
    row = read_eval(root, captioned(root, sequence, "000000000002.jpg"))[0]
    assert (row["answer"], row["answers"]) == ("go", CAPTIONS)


def test_a_picture_without_captions_is_named(root: Path, sequence: TaskSequence) -> None:
    with pytest.raises(
        DataError, match=r"val.json, row 0 .*no entry for this picture \(000000000002.jpg\) in .*captions"
    ):
        read_eval(root, captioned(root, sequence, "000000000003.jpg"))


@pytest.mark.parametrize("document", ["[]", "{}", '{"images": [{"id": 1}], "annotations": []}'])
def test_a_file_that_is_no_coco_captions_is_refused(root: Path, sequence: TaskSequence, document: str) -> None:
    task = captioned(root, sequence, "x.jpg")
    (root / "captions.json").write_text(document)
    with pytest.raises(DataError, match="captions.json: not the annotations of captions"):
        read_eval(root, task)


@pytest.mark.parametrize(("answer", "answers"), [("go", ["go"]), (["go", "Go!"], ["go", "Go!"])])
def test_a_scorer_of_several_answers_gets_all_of_them(
    root: Path, sequence: TaskSequence, edit, answer, answers
) -> None:
    edit("TextVQA/val.json", lambda rows: rows[0].update(answer=answer))
    changes = {"scorer": "vqa_soft", "annotations": None}
    row = read_eval(root, TaskSpec.model_validate(sequence.tasks[1].model_dump() | changes))[0]
    assert (row["answer"], row["answers"]) == ("go", answers)


@pytest.mark.parametrize(("scorer", "answer"), [("gqa", ["go"]), ("vqa_soft", []), ("vqa_soft", ["go", 3])])
def test_an_answer_that_the_scorer_cannot_take_is_named(
    root: Path, sequence: TaskSequence, edit, scorer, answer
) -> None:
    edit("TextVQA/val.json", lambda rows: rows[0].update(answer=answer))
    changes = {"scorer": scorer, "annotations": None}
    with pytest.raises(DataError, match=r"row 0 \(id 11\): no answer"):
        read_eval(root, TaskSpec.model_validate(sequence.tasks[1].model_dump() | changes))
