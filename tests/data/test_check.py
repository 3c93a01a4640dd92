"""The check of a data root counts what is there, finds overlaps, and opens each picture once."""

import io
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import tiny
from rich.console import Console

from llava_cmoe.data import check
from llava_cmoe.data.check import check_sequence
from llava_cmoe.data.check_report import remarks, render
from llava_cmoe.data.coin import read_eval, read_train
from llava_cmoe.data.problems import DataError
from llava_cmoe.data.sequences import load_sequence
from llava_cmoe.data.task_data import TaskData
from llava_cmoe.data.tasks import TaskSequence
from llava_cmoe.runs.run import check_rows

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
    opened: list[str] = []
    find_broken = check.find_broken

    def watched(paths: Iterable[str]) -> dict[str, str]:
        opened.extend(paths)
        return find_broken(paths)

    monkeypatch.setattr(check, "find_broken", watched)
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
    assert seen == [*(("reading rows", number, 6) for number in range(1, 7)), ("opening pictures", 3, 3)]


def test_several_processes_find_what_one_finds(root: Path, sequence: TaskSequence, monkeypatch) -> None:
    for name in ("COCO2014/train2014/000000000001.jpg", "COCO2014/val2014/000000000002.jpg"):
        (root / "cl_dataset" / name).write_text("not a picture")
    monkeypatch.setattr(check, "CHUNK", 1)
    alone = check_sequence(root, sequence)
    assert len(alone.problems) == 2 and check_sequence(root, sequence, processes=2) == alone


def test_a_missing_folder_is_named_once_with_what_is_there_instead(root: Path, sequence: TaskSequence) -> None:
    (root / "cl_dataset/COCO2014/val2014").rename(root / "cl_dataset/COCO2014/Val-2014")
    folder = root / "cl_dataset/ScienceQA/images/train/1"
    (folder / "image.png").rename(folder / "image.PNG")
    reasons = {problem.reason for problem in check_sequence(root, sequence).problems}
    named = f"image folder {root}/cl_dataset/COCO2014/val2014 is missing; there is Val-2014"
    pictures = reasons - {named}
    assert named in reasons and pictures
    assert all(reason.endswith("; there is image.PNG") for reason in pictures)


def test_lost_pictures_stand_apart_from_problems(root: Path, sequence: TaskSequence, edit: Edit) -> None:
    gone = "OCR-VQA/images/1421539896.jpg"
    file = edit("TextVQA/train.json", lambda rows: rows.append(rows[0] | {"image": gone}))
    lost = TaskSequence(name="lost", tasks=tuple(task.model_copy(update={"lost": (gone,)}) for task in sequence.tasks))
    report = check_sequence(root, lost)
    assert report.ok and [(found.file, found.index, found.image) for found in report.lost] == [(file, 1, gone)]
    assert any("left out" in remark and gone in remark for remark in remarks(report))
    assert not check_sequence(root, sequence).ok


def test_published_counts_doubled_ids_and_instructions_are_told_and_stop_nothing(
    root: Path, sequence: TaskSequence, edit: Edit
) -> None:
    edit("TextVQA/train.json", lambda rows: rows.append(json.loads(json.dumps(rows[0]))))
    edit("TextVQA/train.json", lambda rows: rows[1]["conversations"][0].update(value="<image>\nRead it."))
    spec = {"published": {"train": 3, "evaluate": [1, 2]}, "instruction": "What does it say", "notes": ["guess: all"]}
    task = type(sequence.tasks[1]).model_validate(sequence.tasks[1].model_dump() | spec)
    report = check_sequence(root, TaskSequence(name="one", tasks=(task,)))
    train, evaluate = report.files
    assert report.ok and (len(train.doubled_ids), train.without_instruction) == (1, 1)
    assert not train.as_published and evaluate.as_published
    told = list(remarks(report))
    assert told == [
        "folders: Instructions_Original, cl_dataset",
        "textvqa: TextVQA/train.json holds 2 rows, published are 3",
        "textvqa: TextVQA/train.json holds 1 rows without the task's instruction",
        "textvqa: TextVQA/train.json holds ids more than once: 7",
        "textvqa: guess: all",
    ]


def test_data_in_llavas_format_needs_a_yaml_and_nothing_else(root: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    for kind, number in (("train", 3), ("test", 2)):
        (new / "questions/Birds").mkdir(parents=True, exist_ok=True)
        (new / "birds" / kind).mkdir(parents=True)
        rows = []
        for index in range(number):
            name = f"{kind}/{index}.jpg"
            shutil.copy(root / "cl_dataset/COCO2014/train2014/000000000001.jpg", new / "birds" / name)
            turns = [{"from": "human", "value": "<image>\nWhich bird?"}, {"from": "gpt", "value": "a wren"}]
            asked = {"question_id": index, "image": name, "text": "Which bird?", "answer": "a wren"}
            rows.append({"id": index, "image": name, "conversations": turns} if kind == "train" else asked)
        (new / f"questions/Birds/{kind}.json").write_text(json.dumps(rows))
    (new / "birds.yaml").write_text(
        "name: birds\ndefaults: {folder: questions, images: birds, scorer: gqa, max_new_tokens: 8}\n"
        "tasks:\n  - {name: birds, train: Birds/train.json, evaluate: Birds/test.json}\n"
    )
    sequence = load_sequence(new / "birds.yaml")
    report = check_sequence(new, sequence)
    assert report.ok and [count.rows for count in report.files] == [3, 2]
    assert len(read_train(new, sequence.tasks[0])) == 3
    assert read_eval(new, sequence.tasks[0])["answer"] == ["a wren"] * 2


def test_the_table_shows_every_file_and_the_totals(root: Path, sequence: TaskSequence, edit: Edit) -> None:
    edit("Grounding/train.json", lambda rows: rows[0].pop("conversations"))
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render(check_sequence(root, sequence)))
    text = console.export_text()
    lines = {line.split()[3]: line.split() for line in text.splitlines() if ".json" in line}
    assert lines["Grounding/train.json"][-2:] == ["1", "│"]
    assert len(lines) == 6
    assert "1 problems, 0 evaluation rows also learned" in text


@pytest.mark.parametrize(("scorer", "answer"), [("grounding", "left"), ("scienceqa", "left"), ("gqa", "left")])
@pytest.mark.parametrize("most", [12, 30, 1_000])
def test_what_only_a_recipe_knows_is_found_by_both(
    tiny_processor: Any, tiny_backbone: Path, tmp_path: Path, scorer: str, answer: str, most: int
):
    tiny.write_data(tmp_path, ("sides",), pictures=False)
    file = tmp_path / "Instructions_Original/sides/train.json"
    rows = json.loads(file.read_text())
    for number, row in enumerate(rows):
        row["conversations"] = [{"from": "human", "value": "Which?" + " a" * (number % 20)},
                                {"from": "gpt", "value": answer}]  # fmt: skip
    file.write_text(json.dumps(rows))
    document = json.loads((tmp_path / "sequence.yaml").read_text())
    document["tasks"][0]["scorer"] = scorer
    (tmp_path / "sequence.yaml").write_text(json.dumps(document))
    recipe = tiny.recipe(tmp_path / "run", tmp_path, tiny_backbone, "sequential_lora", "evaluation.split=validation",
                         f"training.max_length={most}")  # fmt: skip
    tasks = load_sequence(recipe.data.sequence)
    found = check_sequence(tmp_path, tasks, processor=tiny_processor, max_length=most, validation=True).problems
    found = [problem for problem in found if problem.file == file]  # the test split is not asked
    try:
        data = TaskData.of(recipe)
        data.check(reads_images=True)
        check_rows(recipe, data, 0)
    except DataError as error:
        assert error.problem in found
    else:
        assert not found
