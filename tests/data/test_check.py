"""The check of a data root counts what is there, finds overlaps, and opens each picture once."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llava_cmoe.data import check
from llava_cmoe.data.check import check_sequence, render
from llava_cmoe.data.tasks import TaskSequence

Edit = Callable[[str, Callable[[list[dict[str, Any]]], object]], Path]


def test_a_sound_root_is_counted_file_by_file(root: Path, sequence: TaskSequence) -> None:
    report = check_sequence(root, sequence)
    assert report.ok and report.overlaps == ()
    assert [(count.file, count.rows, count.text_only, count.images) for count in report.files] == [
        ("ScienceQA/train.json", 2, 1, 1),
        ("ScienceQA/test.json", 2, 1, 1),
        ("TextVQA/train.json", 1, 0, 1),
        ("TextVQA/val.json", 1, 0, 1),
        ("Grounding/train.json", 1, 0, 1),
        ("Grounding/test.json", 1, 0, 1),
    ]


def test_each_picture_is_opened_once_and_blamed_on_its_first_row(
    root: Path, sequence: TaskSequence, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit("TextVQA/train.json", lambda rows: rows.append(rows[0] | {"question_id": 8}))
    (root / "cl_dataset/COCO2014/train2014/000000000001.jpg").write_text("not a picture")  # shown by two tasks
    opened: list[Path] = []
    original = check.open_image
    monkeypatch.setattr(check, "open_image", lambda path: (opened.append(path), original(path)))
    (problem,) = check_sequence(root, sequence).problems
    assert len(opened) == len(set(opened)) == 3
    assert problem.file == root / "Instructions_Original/TextVQA/train.json"
    assert (problem.row, problem.row_id) == (0, "7")
    assert "000000000001.jpg: not an image" in problem.reason


@pytest.mark.parametrize("marked", ["<image>\nWhere is it?", "Where is it?\n<image>", "<image>Where is it? "])
def test_a_learned_question_in_the_evaluation_file_is_an_overlap(
    root: Path, sequence: TaskSequence, edit: Edit, marked: str
) -> None:
    row = json.loads((root / "Instructions_Original/Grounding/train.json").read_text())[0]
    question = [{"from": "human", "value": marked}, {"from": "gpt", "value": "[0, 0, 1, 1]"}]
    edit("Grounding/train.json", lambda rows: rows.append(row | {"conversations": question}))
    asked = {"answer_bbox": "[0, 0, 1, 1]", "text": "Where is it?"}
    file = edit(
        "Grounding/test.json",
        lambda rows: rows.extend(
            [
                asked | {"question_id": "same", "image": row["image"]},
                asked | {"question_id": "other picture", "image": rows[0]["image"]},
            ]
        ),
    )
    report = check_sequence(root, sequence)
    assert report.ok
    (overlap,) = report.overlaps
    assert (overlap.file, overlap.row, overlap.row_id) == (file, 1, "same")
    assert overlap.reason.endswith("Grounding/train.json, row 1")


def test_later_questions_of_a_conversation_count_as_learned(root: Path, sequence: TaskSequence, edit: Edit) -> None:
    picture = "COCO2014/train2014/000000000001.jpg"
    edit("TextVQA/val.json", lambda rows: rows[0].update(image=picture, text="Which colour?"))
    (overlap,) = check_sequence(root, sequence).overlaps
    assert overlap.row_id == "11"


def test_progress_runs_to_the_end_of_both_steps(root: Path, sequence: TaskSequence) -> None:
    seen: list[tuple[str, int, int]] = []
    check_sequence(root, sequence, progress=lambda *step: seen.append(step))
    steps = ("reading instruction files", "opening pictures")
    assert seen == [(step, number, 3) for step in steps for number in (1, 2, 3)]


def test_the_table_shows_every_file_and_the_totals(root: Path, sequence: TaskSequence, edit: Edit) -> None:
    edit("Grounding/train.json", lambda rows: rows[0].pop("conversations"))
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render(check_sequence(root, sequence)))
    text = console.export_text()
    lines = {line.split()[3]: line.split() for line in text.splitlines() if ".json" in line}
    assert lines["Grounding/train.json"][-2:] == ["1", "│"]
    assert len(lines) == 6
    assert "1 problems, 0 evaluation rows also learned" in text
