"""Fields that no reader looks at: notes may stay, content is refused by name, and nothing in between is dropped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_cmoe.data.check import check_sequence
from llava_cmoe.data.check_report import remarks
from llava_cmoe.data.coin import read_eval, read_train
from llava_cmoe.data.fields import CONTENT, NOTES, PICTURE_NAMES, READ, unread_fields
from llava_cmoe.data.problems import DataError, Unusable
from llava_cmoe.data.tasks import TaskSequence

Edit = Callable[[str, Callable[[list[dict[str, Any]]], object]], Path]

TURNS = [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "here"}]
ROW = {"id": "1", "image": "a.png", "conversations": TURNS}

something = st.one_of(
    st.text(min_size=1), st.lists(st.text(), min_size=1), st.dictionaries(st.text(), st.integers(), min_size=1)
)
nothing = st.sampled_from([None, "", [], {}])
numbers = st.one_of(st.booleans(), st.floats(), st.integers(), st.lists(st.floats() | st.lists(st.integers())))
unknown = st.from_regex(r"x_[a-z]{1,8}", fullmatch=True).filter(
    lambda key: not key.endswith(("_id", "_ids", "_type", "_idx", "_index"))
)


@given(st.sampled_from(sorted(CONTENT)), something | numbers.filter(lambda value: value != []))
def test_a_field_of_content_is_refused_by_name_with_what_to_do(key: str, value: object) -> None:
    with pytest.raises(Unusable) as error:
        unread_fields(ROW | {key: value})
    assert str(error.value) == f"field `{key}`: {CONTENT[key]}"


@given(st.dictionaries(st.sampled_from(sorted(NOTES)) | st.sampled_from(["img_id", "video_id", "x_type"]), something))
def test_a_note_may_stay_and_is_told(notes: dict[str, object]) -> None:
    assert unread_fields(ROW | notes) == tuple(notes)


@given(unknown, something)
def test_text_under_an_unknown_name_is_refused_with_a_place_for_it(key: str, value: object) -> None:
    with pytest.raises(Unusable, match=f"field `{key}`: what it holds would be left out; .*`metadata`"):
        unread_fields(ROW | {key: value})
    assert unread_fields(ROW | {"metadata": {key: value}}) == ("metadata",)


@given(unknown, numbers)
def test_numbers_under_an_unknown_name_may_stay(key: str, value: object) -> None:
    assert unread_fields(ROW | {key: value}) == (key,)


@given(unknown | st.sampled_from(sorted(CONTENT)), nothing)
def test_a_field_that_holds_nothing_may_stay(key: str, value: object) -> None:
    assert unread_fields(ROW | {key: value}) == (key,)


@pytest.mark.parametrize("key", sorted(PICTURE_NAMES))
def test_another_name_of_a_picture_is_a_note_only_beside_an_image(key: str) -> None:
    assert unread_fields(ROW | {key: "a.png"}) == (key,)
    text_only = {name: value for name, value in ROW.items() if name != "image"}
    with pytest.raises(Unusable, match=f"field `{key}`: the row's picture is read from `image`; rename"):
        unread_fields(text_only | {key: "a.png"})


def test_all_refused_fields_are_named_turns_too() -> None:
    turns = [TURNS[0] | {"image": "b.png"}, TURNS[1] | {"weight": 0, "markdown": None}]
    with pytest.raises(
        Unusable, match="fields `video`, `tools`, `image` of turn 0, `weight` of turn 1: only one picture"
    ):
        unread_fields(ROW | {"video": "a.mp4", "tools": ["zoom"], "conversations": turns})


def test_no_name_is_in_two_groups() -> None:
    groups = [set(READ), set(NOTES), set(CONTENT), set(PICTURE_NAMES)]
    assert sum(map(len, groups)) == len(set().union(*groups))


PUBLISHED = {
    "question_type": "other", "bbox": [0, 0, 10, 20], "metadata": {"split": "val"}, "model_id": "llava",
    "answer_id": "x", "category": "default", "image_id": 7, "height": 480, "width": 640, "question": "Where?",
}  # fmt: skip


def test_published_notes_keep_loading_in_both_kinds_of_file_and_the_check_lists_them(
    root: Path, sequence: TaskSequence, edit: Edit
) -> None:
    before = [read(root, sequence.tasks[2])[0] for read in (read_train, read_eval)]
    for split in ("train", "test"):
        edit(f"Grounding/{split}.json", lambda rows: rows[0].update(PUBLISHED))
    assert [read(root, sequence.tasks[2])[0] for read in (read_train, read_eval)] == before
    report = check_sequence(root, sequence)
    assert report.ok
    told = [remark for remark in remarks(report) if "fields that are not read" in remark]
    assert told == [
        f"grounding: Grounding/{split}.json holds fields that are not read: {', '.join(PUBLISHED)}"
        for split in ("train", "test")
    ]


@pytest.mark.parametrize("key", ["video", "images", "system_prompt", "tools", "audio", "messages", "x_text"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_row_with_content_that_is_not_read_is_found(
    root: Path, sequence: TaskSequence, edit: Edit, key: str, split: str
) -> None:
    def spoil(rows: list[dict[str, Any]]) -> None:
        first = {name: value for name, value in rows[0].items() if name != "image"} | {key: ["a", "b"]}
        text = json.dumps(first).replace("<image>\\n", "")
        rows[:] = [
            json.loads(text) | {"id" if split == "train" else "question_id": f"r{number}"} for number in range(6)
        ]

    file = edit(f"Grounding/{split}.json", spoil)
    problems = check_sequence(root, sequence).problems
    assert [(problem.file, problem.row, problem.row_id) for problem in problems] == [
        (file, number, f"r{number}") for number in range(6)
    ]
    assert all(f"`{key}`" in problem.reason for problem in problems)
    with pytest.raises(DataError, match=rf"{split}\.json, row 0 \(id r0\): .*`{key}`"):
        (read_train if split == "train" else read_eval)(root, sequence.tasks[2])


@pytest.mark.parametrize("inner", ["text", 3])
@pytest.mark.parametrize("depth", [1, 50, 800])
def test_a_note_may_be_nested_as_deep_as_a_reader_reads(
    root: Path, sequence: TaskSequence, edit: Edit, depth: int, inner: object
) -> None:
    deep = json.loads("[" * depth + json.dumps(inner) + "]" * depth)
    edit("Grounding/train.json", lambda rows: rows[0].update(nobody_knows=deep))
    problems = check_sequence(root, sequence).problems
    assert [problem.row for problem in problems] == ([] if inner == 3 else [0])
