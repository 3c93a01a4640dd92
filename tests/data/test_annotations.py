"""Captions in COCO's format give each evaluation row all captions of its picture; lists of answers are read."""

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_cmoe.data.annotations import read_annotations
from llava_cmoe.data.check import check_sequence
from llava_cmoe.data.coin import read_eval
from llava_cmoe.data.problems import DataError, Unusable
from llava_cmoe.data.rows import EvalRow
from llava_cmoe.data.tasks import TaskSequence, TaskSpec

CAPTIONS = ["a red thing", "something red"]


def captioned(root: Path, sequence: TaskSequence, file_name: str) -> TaskSpec:
    images = [{"id": 1, "file_name": "other.jpg"}, {"id": 2, "file_name": file_name}]
    document = {"images": images, "annotations": [{"image_id": 2, "caption": caption} for caption in CAPTIONS]}
    (root / "captions.json").write_text(json.dumps(document))
    changes = {"scorer": "captions", "annotations": "captions.json"}
    return TaskSpec.model_validate(sequence.tasks[1].model_dump() | changes)


def test_captions_are_joined_by_a_bare_file_name_where_it_is_the_only_one(root: Path, sequence: TaskSequence) -> None:
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


def caption_file(names: Sequence[str]) -> dict[str, Any]:
    """COCO's format: a caption for each picture, which is the picture's name."""
    return {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(names)],
        "annotations": [{"image_id": number, "caption": name} for number, name in enumerate(names)],
    }


def row_of(row_id: str, image: str) -> EvalRow:
    return {
        **{"id": row_id, "image": image, "turns": [{"role": "user", "text": "<image>"}], "answer": "x"},
        **{"answers": [], "box": [], "choices": [], "size": []},
    }  # type: ignore[typeddict-item]


def captions_of(names: Sequence[str], *images: str) -> list[list[str]]:
    """The captions that pictures of the folder /data/pictures get."""
    found = read_annotations(Path("caps.json"), caption_file(names), "captions", Path("/data/pictures"))
    rows = [row_of(f"r{number}", f"/data/pictures/{image}") for number, image in enumerate(images)]
    for row in rows:
        found.complete(row)
    return [row["answers"] for row in rows]


folders = st.sampled_from(["day", "night", "a/day", "b/day", "a/night"])
paths = st.lists(st.builds("{}/{}.png".format, folders, st.integers(1, 2)), min_size=1, unique=True)


@given(paths, st.sampled_from(["", "pictures/", "data/pictures/", "/data/pictures/", "published/", "/mnt/x/pictures/"]))
def test_every_picture_gets_its_own_captions_however_much_of_its_path_is_written(names: list[str], above: str) -> None:
    """Pictures of one bare name in several folders had the captions of the last of them."""
    assert captions_of([above + name for name in names], *names) == [[above + name] for name in names]


@given(paths)
def test_a_bare_name_never_serves_two_pictures(names: list[str]) -> None:
    bare = sorted({name.rpartition("/")[2] for name in names})
    if len(bare) == len(names):
        assert captions_of(bare, *names) == [[name.rpartition("/")[2]] for name in names]
    else:
        with pytest.raises(Unusable, match="would get the captions of .* as /data/pictures/.* of row 'r.* does"):
            captions_of(bare, *names)


def test_two_questions_about_one_picture_share_its_captions() -> None:
    assert captions_of(["1.png"], "day/1.png", "day/1.png") == [["1.png"]] * 2


def test_captions_of_another_folder_are_no_ones() -> None:
    with pytest.raises(Unusable, match=r"no entry for this picture \(1\.png\) in caps\.json; there is night/1\.png"):
        captions_of(["night/1.png"], "day/1.png")
    with pytest.raises(Unusable, match=r"several entries .*\(1\.png\) in caps\.json: day/1\.png and night/1\.png"):
        captions_of(["day/1.png", "night/1.png"], "1.png")


def test_the_longest_file_name_that_fits_counts() -> None:
    assert captions_of(["1.png", "day/1.png"], "day/1.png", "night/1.png") == [["day/1.png"], ["1.png"]]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_name_is_compared_in_one_unicode_spelling(form: Any) -> None:
    other = "NFD" if form == "NFC" else "NFC"
    written, asked = (unicodedata.normalize(kind, "d\u00eda/caf\u00e9.png") for kind in (form, other))
    assert captions_of([written], asked) == [[written]]


def doubled(key: str) -> dict[str, Any]:
    document = caption_file(["day/1.png", "day/2.png", "night/1.png"])
    document["images"][2][key] = document["images"][0][key]
    return document


@pytest.mark.parametrize("key", ["id", "file_name"])
def test_a_key_that_two_pictures_share_is_refused_with_both(key: str) -> None:
    with pytest.raises(DataError, match=r"caps\.json: entries 0 and 2 have the same (image id|file_name)"):
        read_annotations(Path("caps.json"), doubled(key), "captions", Path("/data"))


@given(st.lists(st.integers(0, 9), min_size=2), st.sampled_from([int, str]))
def test_a_question_that_is_annotated_twice_is_refused_with_both(ids: list[int], other_type: type) -> None:
    """The last of them was taken, whether the id is written as a number or as a text."""
    written = [other_type(value) if place % 2 else value for place, value in enumerate(ids)]
    document = {"data": [{"question_id": value, "answers": [str(value)] * 10} for value in written]}
    if len(set(ids)) == len(ids):
        read_annotations(Path("a.json"), document, "textvqa", Path("/data"))
    else:
        second = next(place for place in range(len(ids)) if ids[place] in ids[:place])
        places = f"entries {ids.index(ids[second])} and {second} have the same question_id '{ids[second]}'"
        with pytest.raises(DataError, match=f"a.json: {places}; keep one"):
            read_annotations(Path("a.json"), document, "textvqa", Path("/data"))


@pytest.mark.parametrize("task", [0, 1])
def test_a_problem_that_is_in_the_file_twice_is_refused(root: Path, sequence: TaskSequence, task: int) -> None:
    """An object with a key twice: Python's reader keeps the last one."""
    file = root / "cl_dataset" / ("ScienceQA/problems.json" if task == 0 else "TextVQA/answers.json")
    choices = '{"choices": ["up", "down", "left"]}'
    one, other = f'"3": {choices}', '"4": {"choices": ["yes", "no"]}'
    answers = '{"question_id": 11, "answers": ["a"], "answers": ["b"]}'
    file.write_text(f"{{{one}, {other}, {one}}}" if task == 0 else f'{{"data": [{answers}]}}')
    said = r"key '3' occurs twice in one object, as its entries 0 and 2" if task == 0 else "'answers' occurs .* id 11"
    with pytest.raises(DataError, match=rf"{file.name}: .*{said}"):
        read_eval(root, sequence.tasks[task])
    assert len(check_sequence(root, sequence).problems) == 1


def test_a_caption_is_one_text_and_a_picture_has_one(root: Path, sequence: TaskSequence) -> None:
    document = caption_file(["1.png"])
    document["annotations"][0]["caption"] = ["a", "b"]
    with pytest.raises(DataError, match="annotation 0: a caption is one text, found an array"):
        read_annotations(Path("caps.json"), document, "captions", Path("/data"))
    nothing = {**caption_file(["1.png"]), "annotations": []}
    with pytest.raises(Unusable, match=r"no caption for this picture \(1\.png\)"):
        read_annotations(Path("caps.json"), nothing, "captions", Path("/data")).complete(row_of("1", "/data/1.png"))


def test_rows_of_one_bare_name_in_two_folders_get_their_own(root: Path, sequence: TaskSequence, edit: Any) -> None:
    for folder in ("day", "night"):
        (root / "cl_dataset" / folder).mkdir()
        (root / "cl_dataset" / folder / "1.png").touch()
    (root / "captions.json").write_text(json.dumps(caption_file(["day/1.png", "night/1.png"])))
    changes = {"scorer": "captions", "annotations": "captions.json"}
    task = TaskSpec.model_validate(sequence.tasks[1].model_dump() | changes)

    def two(rows: list[dict[str, Any]]) -> None:
        rows[:] = [rows[0] | {"question_id": folder, "image": f"{folder}/1.png"} for folder in ("day", "night")]

    file = edit("TextVQA/val.json", two)
    assert read_eval(root, task)["answers"] == [["day/1.png"], ["night/1.png"]]
    (root / "captions.json").write_text(json.dumps(caption_file(["1.png"])))
    with pytest.raises(DataError, match=rf"{file}, row 1 \(id night\): .*night/1\.png would get .* of row 'day'"):
        read_eval(root, task)
