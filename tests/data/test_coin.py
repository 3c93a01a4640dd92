"""CoIN's files become canonical rows, and each kind of broken input is named with file, row and reason."""

import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from llava_cmoe.data.check import check_sequence
from llava_cmoe.data.coin import read_eval, read_train
from llava_cmoe.data.coin_rows import box_of
from llava_cmoe.data.problems import DataError, Unusable
from llava_cmoe.data.tasks import COIN_FOLDERS, TaskSequence, TaskSpec

Edit = Callable[[str, Callable[[list[dict[str, Any]]], object]], Path]


def test_training_rows_keep_turns_and_get_the_marker_first_and_absolute_paths(
    root: Path, sequence: TaskSequence
) -> None:
    science, text, _ = (read_train(root, task) for task in sequence.tasks)
    assert science[0] == {
        "id": "1",
        "image": str(root.resolve() / "cl_dataset/ScienceQA/images/train/1/image.png"),
        "turns": [{"role": "user", "text": "<image>\nWhich one?\nA. up\nB. down"}, {"role": "assistant", "text": "A"}],
    }
    assert science[1]["image"] is None
    assert text[0]["id"] == "7"
    assert [turn["role"] for turn in text[0]["turns"]] == ["user", "assistant"] * 2
    assert text[0]["image"].endswith("/cl_dataset/COCO2014/train2014/000000000001.jpg")


def test_evaluation_rows_get_the_marker_and_what_their_task_is_judged_by(root: Path, sequence: TaskSequence) -> None:
    science, text, grounding = (read_eval(root, task) for task in sequence.tasks)
    assert science[0]["turns"] == [{"role": "user", "text": "<image>\nWhich other?\nA. up\nB. down\nC. left"}]
    assert science[1]["turns"] == [{"role": "user", "text": "Is fire cold?\nA. yes\nB. no"}]
    assert science["choices"] == [["up", "down", "left"], ["yes", "no"]]
    assert science["answers"] == science["box"] == [[], []]
    assert (text[0]["answer"], text[0]["answers"]) == ("go", ["go"] * 9 + ["goo"])
    assert (grounding[0]["answer"], grounding[0]["box"]) == ("[0.12, 0.5, 0.75, 1.0]", [0.12, 0.5, 0.75, 1.0])
    assert (science[0]["size"], grounding[0]["size"]) == ([], [30, 20])


@pytest.mark.parametrize("folder", COIN_FOLDERS)
def test_every_spelling_of_the_instruction_folder_is_read(root: Path, sequence: TaskSequence, folder: str) -> None:
    (root / "Instructions_Original").rename(root / folder)
    assert len(read_train(root, sequence.tasks[0])) == 2


def test_a_file_that_is_there_in_two_spellings_is_refused_by_both_names(root: Path, sequence: TaskSequence) -> None:
    shutil.copytree(root / "Instructions_Original", root / "Instruction_Type2")
    with pytest.raises(
        DataError, match=r"Instructions_Original/.*is also there as .*Instruction_Type2/ScienceQA/train"
    ):
        read_train(root, sequence.tasks[0])
    named = sequence.tasks[0].model_copy(update={"folder": ("Instruction_Type2",)})
    assert len(read_train(root, named)) == 2


def test_a_task_may_have_folders_of_its_own_and_other_spellings_of_its_files(
    root: Path, sequence: TaskSequence
) -> None:
    (root / "Instructions_Original/Grounding").rename(root / "REC")
    (root / "cl_dataset/COCO2014/val2014").rename(root / "asked")
    rows = json.loads((root / "REC/test.json").read_text())
    (root / "REC/test.json").write_text(json.dumps([rows[0] | {"image": "000000000002.jpg"}]))
    spec = {"train": ["RES/train.json", "REC/train.json"], "evaluate": "REC/test.json", "evaluate_images": "asked"}
    task = TaskSpec.model_validate(sequence.tasks[2].model_dump() | spec | {"folder": ["Instructions_New", "."]})
    assert len(read_train(root, task)) == 1
    assert read_eval(root, task)[0]["image"] == str((root / "asked/000000000002.jpg").resolve())


def test_missing_instruction_folder_is_one_problem_for_the_whole_sequence(root: Path, sequence: TaskSequence) -> None:
    (root / "Instructions_Original").rename(root / "instructions")
    with pytest.raises(
        DataError, match="no instruction folder; expected Instructions_Original .*found cl_dataset, instructions"
    ):
        read_eval(root, sequence.tasks[1])
    assert len(check_sequence(root, sequence).problems) == 1


def test_the_picture_folder_may_be_a_link_as_a_whole(root: Path, sequence: TaskSequence, tmp_path: Path) -> None:
    (root / "cl_dataset").rename(tmp_path / "elsewhere")
    (root / "cl_dataset").symlink_to(tmp_path / "elsewhere")
    assert check_sequence(root, sequence).ok


def test_an_absolute_path_is_refused_even_inside_the_root(root: Path, sequence: TaskSequence, edit: Edit) -> None:
    picture = root / "cl_dataset/COCO2014/train2014/000000000001.jpg"
    edit("Grounding/train.json", lambda rows: rows[0].update(image=str(picture)))
    with pytest.raises(DataError, match="leaves the root"):
        read_train(root, sequence.tasks[2])


def test_an_evaluation_row_may_place_the_marker_itself(root: Path, sequence: TaskSequence, edit: Edit) -> None:
    edit("Grounding/test.json", lambda rows: rows[0].update(text="Where?\n<image>"))
    assert read_eval(root, sequence.tasks[2])[0]["turns"] == [{"role": "user", "text": "<image>\nWhere?"}]


def test_rows_of_pictures_lost_everywhere_are_left_out_and_logged(
    root: Path, sequence: TaskSequence, edit: Edit, caplog: pytest.LogCaptureFixture
) -> None:
    gone = "OCR-VQA/images/1421539896.jpg"
    edit("TextVQA/train.json", lambda rows: rows.append(rows[0] | {"image": f"./{gone}"}))
    with pytest.raises(DataError, match="row 1 .*OCR-VQA is missing"):
        read_train(root, sequence.tasks[1])
    assert len(read_train(root, sequence.tasks[1].model_copy(update={"lost": (gone,)}))) == 1
    assert "row 1 (id 7): left out" in caplog.text


def _turns(*turns: object) -> Callable[[dict[str, Any]], None]:
    return lambda row: row.update(conversations=list(turns))


def _set(**values: object) -> Callable[[dict[str, Any]], None]:
    return lambda row: row.update(values)


def _drop(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda row: row.pop(key)


ASK = {"from": "human", "value": "<image>\nWhere?"}
SAY = {"from": "gpt", "value": "here"}

# file of task 3, what is done to its row, the reason that must be named
BROKEN_ROWS: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "no conversations": ("train", _drop("conversations"), "no conversations"),
    "empty conversations": ("train", _turns(), "no conversations"),
    "answer first": ("train", _turns(SAY, ASK), "wrong turn order: turn 0 must be from human, found 'gpt'"),
    "two questions": ("train", _turns(ASK, ASK), "wrong turn order: turn 1 must be from gpt, found 'human'"),
    "question last": ("train", _turns(ASK, SAY, ASK), "wrong turn order: the conversation ends with human"),
    "turn not an object": ("train", _turns("hello", SAY), "wrong turn order: turn 0 must be from human, found None"),
    "empty answer": ("train", _turns(ASK, SAY | {"value": " "}), "turn 1 (gpt) has no text"),
    "marker without image": ("train", _drop("image"), "<image> in the text, but the row has no image"),
    "image without marker": ("train", _turns(ASK | {"value": "?"}, SAY), "the row has an image, but no <image>"),
    "two markers": ("train", _turns(ASK | {"value": "<image><image>"}, SAY), "<image> occurs 2 times"),
    "late marker": ("train", _turns(ASK | {"value": "?"}, SAY, ASK, SAY), "<image> occurs in turn 2, expected in the"),
    "missing picture": ("train", _set(image="COCO2014/none.jpg"), "image file COCO2014/none.jpg is missing"),
    "overlong name": ("train", _set(image="x" * 5000), "is missing"),
    "zero byte": ("train", _set(image="a\0b"), "image must be a path relative to cl_dataset/"),
    "picture is a number": ("train", _set(image=3), "image must be a path relative to cl_dataset/, found 3"),
    "two pictures": ("train", _set(images=["a.jpg", "b.jpg"]), "`images` names 2 pictures; only one picture a row"),
    "two pictures at once": ("test", _set(image=["a.jpg", "b.jpg"]), "`image` names 2 pictures"),
    "another picture": ("test", _set(images=["a.jpg"]), "`image` and `images` name different pictures"),
    "a video": ("train", _set(video="a.mp4"), "field `video`: only one picture a row is read; take such rows out"),
    "a system prompt": ("train", _set(system="Be brief."), "field `system`: no system prompt is learned"),
    "an unknown text": ("test", _set(remark="look left"), "field `remark`: what it holds would be left out; delete it"),
    "invisible answer": ("train", _turns(ASK, SAY | {"value": "\u200b"}), "turn 1 (gpt) has no text"),
    "invisible question": ("test", _set(text="\ufeff"), "no text (the question)"),
    "absolute path": (
        "train",
        _set(image="/etc/hostname"),
        "image path /etc/hostname leaves the root, for /etc/hostname",
    ),
    "dotted path": ("train", _set(image="COCO2014/../../x.jpg"), "image path COCO2014/../../x.jpg leaves the root"),
    "link out": ("train", _set(image="COCO2014/out.jpg"), "image path COCO2014/out.jpg leaves the root, for "),
    "truncated picture": ("train", _set(image="COCO2014/cut.jpg"), "truncated or broken image"),
    "not a picture": ("train", _set(image="TextVQA/answers.json"), "not an image"),
    "no id": ("train", _drop("id"), "no id"),
    "id is a truth value": ("train", _set(id=True), "no id"),
    "no question": ("test", _drop("text"), "no text (the question)"),
    "no answer": ("test", _drop("answer_bbox"), "no answer_bbox"),
    "evaluation marker without image": (
        "test",
        lambda row: (row.pop("image"), row.update(text="<image>")),
        "<image> in",
    ),
    "box of three": ("test", _set(answer_bbox="[0.1, 0.2, 0.3]"), "malformed answer_bbox '[0.1, 0.2, 0.3]'"),
    "box of words": ("test", _set(answer_bbox="[a, b, c, d]"), "malformed answer_bbox"),
    "box in pixels": ("test", _set(answer_bbox="[0, 0, 20, 20]"), "each from 0 to 1"),
    "box with nan": ("test", _set(answer_bbox="[nan, 0, 1, 1]"), "each from 0 to 1"),
    "box without brackets": ("test", _set(answer_bbox="0.1, 0.2, 0.3, 0.45"), "expected [x1, y1, x2, y2]"),
    "box backwards": ("test", _set(answer_bbox="[0.9, 0, 0.1, 1]"), "x1 <= x2 and y1 <= y2 must hold"),
    "size of one": ("test", _set(size=[640]), "malformed size [640]"),
    "size of nothing": ("test", _set(size=[640, 0]), "expected [width, height] in pixels"),
    "size in words": ("test", _set(size="640x480"), "malformed size"),
}


def _break(root: Path, edit: Edit, kind: str, tmp_path: Path) -> tuple[Path, int]:
    """Append a row broken in one way; returns the file and the row's index."""
    split, mutate, _ = BROKEN_ROWS[kind]
    index = 0

    def append(rows: list[dict[str, Any]]) -> None:
        nonlocal index
        index = len(rows)
        row = json.loads(json.dumps(rows[0])) | {"id" if split == "train" else "question_id": f"broken-{index}"}
        mutate(row)
        rows.append(row)

    outside = tmp_path / "outside.jpg"
    link, cut = root / "cl_dataset/COCO2014/out.jpg", root / "cl_dataset/COCO2014/cut.jpg"
    if not link.is_symlink():
        whole = (root / "cl_dataset/COCO2014/train2014/000000000001.jpg").read_bytes()
        outside.write_bytes(whole)
        link.symlink_to(outside)
        cut.write_bytes(whole[:-40])
    return edit(f"Grounding/{split}.json", append), index


UNOPENED = {"truncated picture", "not a picture"}  # only the check opens pictures


@pytest.mark.parametrize("kind", sorted(set(BROKEN_ROWS) - UNOPENED))
def test_reader_names_file_row_and_reason(
    root: Path, sequence: TaskSequence, edit: Edit, kind: str, tmp_path: Path
) -> None:
    file, index = _break(root, edit, kind, tmp_path)
    read = read_train if file.name == "train.json" else read_eval
    with pytest.raises(DataError) as error:
        read(root, sequence.tasks[2])
    problem = error.value.problem
    assert (problem.file, problem.row) == (file, index)
    assert BROKEN_ROWS[kind][2] in problem.reason
    assert str(error.value).startswith(f"{file}, row {index}")


def test_check_finds_every_kind_of_broken_row_at_once(
    root: Path, sequence: TaskSequence, edit: Edit, tmp_path: Path
) -> None:
    assert check_sequence(root, sequence).problems == ()
    broken = {_break(root, edit, kind, tmp_path): BROKEN_ROWS[kind][2] for kind in BROKEN_ROWS}
    found = {(problem.file, problem.row): problem.reason for problem in check_sequence(root, sequence).problems}
    assert found.keys() == broken.keys()
    for place, reason in broken.items():
        assert reason in found[place]


def test_doubled_ids_are_an_error_in_evaluation_files_only(root: Path, sequence: TaskSequence, edit: Edit) -> None:
    edit("Grounding/train.json", lambda rows: rows.append(rows[0]))
    assert len(read_train(root, sequence.tasks[2])) == 2
    edit("Grounding/test.json", lambda rows: rows.append(rows[0] | {"question_id": "1"}))
    with pytest.raises(DataError, match=r"test.json, row 1 \(id 1\): the id occurs in an earlier row, 0"):
        read_eval(root, sequence.tasks[2])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'[{"id": 1},\n {"id": 2,}]', "broken JSON at line 2, column "),
        (b"[", "broken JSON at line 1, column 2"),
        (b'{"id": 1}', "expected a JSON array of rows, found an object"),
        (b"[]", "expected a JSON array of rows, found an empty array"),
        (b"", "the file is empty"),
        (b"\xef\xbb\xbf\n", "the file is empty"),
        (b'{"id": 1}\n{"id": 2}', "broken JSON at line 2, column 1: Extra data; one object a line"),
        (b'["\xff"]', "not UTF-8 text at byte 2"),
        (b'["x"]', "a row is an object, found a string"),
        (
            b'[{"id": 1, "image": "a", "image": "b"}]',
            "key 'image' occurs twice in the object with id 1, as its entries 1",
        ),
        (None, "cannot read the file (No such file or directory)"),
    ],
)
@pytest.mark.parametrize("name", ["Grounding/train.json", "Grounding/test.json"])
def test_broken_files_are_named(
    root: Path, sequence: TaskSequence, name: str, content: bytes | None, reason: str
) -> None:
    file = root / "Instructions_Original" / name
    if content is None:
        os.remove(file)
    else:
        file.write_bytes(content)
    with pytest.raises(DataError) as error:
        (read_train if "train" in name else read_eval)(root, sequence.tasks[2])
    assert error.value.problem.file == file
    assert reason in error.value.problem.reason
    assert check_sequence(root, sequence).problems == (error.value.problem,)


def test_byte_order_mark_is_no_error(root: Path, sequence: TaskSequence) -> None:
    file = root / "Instructions_Original/Grounding/train.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(read_train(root, sequence.tasks[2])) == 1


@pytest.mark.parametrize("name", ["ScienceQA/problems.json", "TextVQA/answers.json"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot read the file"),
        ("[]", "not the annotations of"),
        ('{"data": [{}], "9": {}}', "not the annotations"),
    ],
)
def test_broken_annotations_are_named(
    root: Path, sequence: TaskSequence, name: str, content: str | None, reason: str
) -> None:
    file = root / "cl_dataset" / name
    file.unlink() if content is None else file.write_text(content)
    task = sequence.tasks[0 if "ScienceQA" in name else 1]
    with pytest.raises(DataError, match=reason) as error:
        read_eval(root, task)
    assert error.value.problem.file == file
    assert check_sequence(root, sequence).problems == (error.value.problem,)


def test_a_row_without_annotations_is_named(root: Path, sequence: TaskSequence, edit: Edit) -> None:
    edit("TextVQA/val.json", lambda rows: rows.append(rows[0] | {"question_id": 12}))
    with pytest.raises(DataError, match=r"row 1 \(id 12\): no entry for this id in .*answers.json"):
        read_eval(root, sequence.tasks[1])


def test_annotations_of_a_task_that_has_none_are_refused(root: Path, sequence: TaskSequence) -> None:
    task = sequence.tasks[2].model_copy(update={"annotations": ("cl_dataset/TextVQA/answers.json",)})
    with pytest.raises(DataError, match="not for scorer grounding"):
        read_eval(root, task)


def test_a_box_may_end_a_rounding_outside_the_picture():
    assert box_of("[-0.0002, 0.1, 0.5, 1.00002]") == [-0.0002, 0.1, 0.5, 1.00002]
    with pytest.raises(Unusable, match="each from 0 to 1"):
        box_of("[0, 0.1, 0.5, 1.01]")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("folder", [False, True])
def test_a_picture_that_is_there_in_another_unicode_form_is_hinted_at(
    root: Path, sequence: TaskSequence, edit: Edit, form: Literal["NFC", "NFD"], folder: bool
) -> None:
    name = "caf\u00e9/1.jpg" if folder else "caf\u00e9.jpg"
    there = root / "cl_dataset" / unicodedata.normalize(form, name)
    there.parent.mkdir(exist_ok=True)
    shutil.copy(root / "cl_dataset/COCO2014/train2014/000000000001.jpg", there)
    asked = unicodedata.normalize("NFC" if form == "NFD" else "NFD", name)
    if (root / "cl_dataset" / asked).exists():
        pytest.skip("this file system knows one form alone")
    edit("Grounding/train.json", lambda rows: rows[0].update(image=asked))
    composed, decomposed = "caf\\\\xe9", "cafe\\\\u0301"
    says, disk = (composed, decomposed) if form == "NFD" else (decomposed, composed)
    with pytest.raises(DataError, match=rf"is missing.*the row says {says}\S*, the disk {disk}\S*; rename either"):
        read_train(root, sequence.tasks[2])


def test_a_full_width_name_is_hinted_at_and_an_unlike_one_is_not(
    root: Path, sequence: TaskSequence, edit: Edit
) -> None:
    (root / "cl_dataset/\uff11.jpg").touch()
    edit("Grounding/train.json", lambda rows: rows[0].update(image="1.jpg"))
    with pytest.raises(DataError, match=r"the row says 1\.jpg, the disk \\uff11\.jpg"):
        read_train(root, sequence.tasks[2])
    edit("Grounding/train.json", lambda rows: rows[0].update(image="2.jpg"))
    with pytest.raises(DataError, match=r"2\.jpg is missing \(looked for \S+\)$"):
        read_train(root, sequence.tasks[2])


@pytest.mark.parametrize("keys", [{"images": ["{}"]}, {"image": ["{}"]}, {"image": "{}", "images": ["{}"]}])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_list_of_one_picture_is_that_picture(
    root: Path, sequence: TaskSequence, edit: Edit, keys: dict[str, Any], split: str
) -> None:
    read = read_train if split == "train" else read_eval
    expected = read(root, sequence.tasks[2])[0]

    def list_it(rows: list[dict[str, Any]]) -> None:
        name = rows[0].pop("image")
        rows[0].update(json.loads(json.dumps(keys).replace("{}", name)))

    edit(f"Grounding/{split}.json", list_it)
    assert read(root, sequence.tasks[2])[0] == expected


QUESTIONS = ["Where?", "Which one?\nA. up\nB. down", "Where is it?\n\nAnswer briefly.", "\u00bfD\u00f3nde?"]


@pytest.mark.parametrize("words", QUESTIONS)
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "learned", ["<image>\n{}", "{}\n<image>", "<image>{}", "{} <image>", " <image>\n {} \n", "{}<image>\n"]
)
@pytest.mark.parametrize("asked", ["{}", "{}\n", " {}", "<image>\n{}", "{}\n<image>"])
def test_what_is_learned_and_what_is_asked_is_one_prompt(
    root: Path, sequence: TaskSequence, edit: Edit, words: str, ends: str, learned: str, asked: str
) -> None:
    turns = [{"from": "human", "value": learned.format(words).replace("\n", ends)}, SAY]
    edit("Grounding/train.json", lambda rows: rows[0].update(conversations=turns))
    edit("Grounding/test.json", lambda rows: rows[0].update(text=asked.format(words).replace("\n", ends)))
    train, evaluate = read_train(root, sequence.tasks[2])[0], read_eval(root, sequence.tasks[2])[0]
    assert train["turns"][0] == evaluate["turns"][0] == {"role": "user", "text": f"<image>\n{words}"}


def test_a_text_only_question_and_later_turns_are_one_prompt_too(
    root: Path, sequence: TaskSequence, edit: Edit
) -> None:
    turns = [ASK, SAY, {"from": "human", "value": " Which\r\ncolour? "}, SAY]
    edit("Grounding/train.json", lambda rows: rows[0].update(conversations=turns))
    assert read_train(root, sequence.tasks[2])[0]["turns"][2]["text"] == "Which\ncolour?"
    edit("Grounding/test.json", lambda rows: (rows[0].pop("image"), rows[0].update(text=" Which\r\ncolour? ")))
    assert read_eval(root, sequence.tasks[2])[0]["turns"][0]["text"] == "Which\ncolour?"


def test_a_question_that_is_the_picture_alone_is_learned_and_asked_alike(
    root: Path, sequence: TaskSequence, edit: Edit
) -> None:
    edit("Grounding/train.json", lambda rows: rows[0].update(conversations=[ASK | {"value": "<image>\n"}, SAY]))
    edit("Grounding/test.json", lambda rows: rows[0].update(text="<image>"))
    train, evaluate = read_train(root, sequence.tasks[2])[0], read_eval(root, sequence.tasks[2])[0]
    assert train["turns"][0] == evaluate["turns"][0] == {"role": "user", "text": "<image>"}
